"""All measurements, one after the other; `python -m benchmarks.run`."""

from benchmarks import (
    asking,
    command_line,
    dashboard,
    deciding,
    driver,
    early_stopping,
    kernels_cpu,
    long_recall,
    mixers_cpu,
    orchestration,
    proxies,
    recall_by_state,
    sparsity_cpu,
    stacked_cpu,
    state_tracking,
    whole_vocabulary,
)


def main() -> None:
    """Run each and write its results."""
    for module in (
        command_line,
        kernels_cpu,
        mixers_cpu,
        stacked_cpu,
        driver,
        asking,
        deciding,
        early_stopping,
        proxies,
        whole_vocabulary,
        state_tracking,
        recall_by_state,
        sparsity_cpu,
        long_recall,
        orchestration,
        dashboard,
    ):
        print(f"\n{module.__name__}: {module.__doc__}", flush=True)
        module.main()


if __name__ == "__main__":
    main()

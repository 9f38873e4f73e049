"""`nas cancel`: end a job; what it has found stays in its database."""

from nas.cli.options import AddressOption, JobArgument, JsonOption

NAME = "cancel"
MOST_S = 30.0
"""How long to wait for the end: Ray asks a job to stop, and kills it a few seconds later."""


def command(job: JobArgument, address: AddressOption = None, json: JsonOption = False) -> int:
    """Stop a job at once. Results stay; the same nas submit goes on where it ended."""
    import time

    from nas.cli.output import print_json, say
    from nas.jobs.address import find_head
    from nas.jobs.cluster import Cluster

    cluster = Cluster(find_head(address))
    before = cluster.job(job)
    # A job that is over may still have its supervisor for a moment, so that its own answer is not asked.
    asked = not before.over and cluster.stop(job)
    until = time.monotonic() + MOST_S
    now = cluster.job(job)
    while asked and not now.over and time.monotonic() < until:
        time.sleep(0.5)
        now = cluster.job(job)
    if json:
        print_json({"job": job, "status": now.status, "asked_to_stop": asked})
    elif not asked:
        say(f"job {job} had ended already: {now.status}")
    elif now.over:
        say(f"job {job}: {now.status}; what it has found is in its database, and the same nas submit goes on")
    else:
        say(f"job {job} was asked to stop and has not ended yet; nas jobs says when it has")
    return 0

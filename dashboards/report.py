"""Writes a study as one file of HTML that needs nothing else: no server, no network, no other file."""

import json
import os
import tempfile
import time
from pathlib import Path

from markupsafe import Markup

from dashboards import assets, charts, commands, facts, tables
from dashboards.charts import Figure
from dashboards.front_chart import front
from dashboards.front_page import headline
from dashboards.growth_chart import baseline, hypervolume
from dashboards.limits import limits_of
from dashboards.pages import ReportPage, legend, render
from dashboards.reasons import Reasons
from dashboards.scene import Scene
from dashboards.space_chart import front_3d
from dashboards.view import study_view
from dashboards.why import why
from storage.records import StudyRecord
from storage.store import Store


def write_report(store: Store, study: StudyRecord, path: Path, reasons: Reasons | None = None) -> None:
    """Writes the report of a study to a file, aside first, so that readers see the old one or the new one.

    With reasons, which the floor above computes, it says why these layers.
    """
    text = render(report_page(store, study, reasons))
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # The temporary file is for its owner alone; a report is as readable as any file that one writes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def report_page(store: Store, study: StudyRecord, reasons: Reasons | None = None) -> ReportPage:
    """Everything that the report prints."""
    trials = store.trials(study)
    view = study_view(study, trials)
    counts = store.counts(study)
    figures: dict[str, Figure] = {}
    if view.points:
        figures = {
            "front": front(view, scene=Scene(limits=limits_of(study.config))),
            "hypervolume": hypervolume(view, baseline(view)),
            "layouts": charts.layouts(view),
        }
        if len(view.axes) >= 3:
            figures["front_3d"] = front_3d(view)
    section = why(reasons, study.families) if reasons is not None and view.points else None
    figures |= {picture.key: picture.figure for picture in section.pictures} if section else {}
    scripts = (
        [assets.plotly_js(), assets.text("crowd.js"), assets.text("charts.js")] if figures else ["void 0"]
    )
    scripts.append(assets.text("tables.js"))
    # The policy names every script by its hash: whatever else found its way into the file would not run,
    # and nothing in it may reach the network.
    allowed = " ".join(assets.source_hash(script) for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; base-uri 'none'"
    return ReportPage(
        name=study.name,
        policy=policy,
        style=Markup(assets.stylesheet()),
        counted=facts.counted(counts),
        dates=f"begun {_date(study.created_at)}, written {_date(time.time())}",
        measured=len(view.points),
        figures=headline(view, len(trials)) if view.points else (),
        front=tables.front(view, linked=False),
        legend=legend(view),
        beaten=view.beaten,
        hypervolume=tables.hypervolume(view),
        why=section,
        trials=tables.trials(view, [seen for seen in view.glances if seen is not None], linked=False),
        facts=facts.searched(study, trials),
        command=commands.search(store.shown_url, study.name),
        config_hash=study.config_hash,
        storage=store.shown_url,
        pictures={key: inline_json(figure) for key, figure in figures.items()},
        scripts=tuple(Markup(script) for script in scripts),
    )


def inline_json(figure: Figure) -> Markup:
    """JSON that may stand inside a script element: no text in it can end the element or open a comment."""
    return Markup(json.dumps(figure, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c"))


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))

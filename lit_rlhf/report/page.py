"""The page of the report: one HTML file that needs no network, and pictures of its charts."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError
from lit_rlhf.report.run import Run, differences, read_run
from lit_rlhf.report.summary import summarize

HERE = Path(__file__).parent


def write_report(folders: Sequence[Path], out: Path | None = None, *, pictures: bool = True) -> Path:
    """Write the report of one or several runs, using only the files in their folders.

    Args:
        folders: The folders of the runs.
        out: The file to write; None for ``report.html`` in the run's folder or, for several runs, in the parent of the
            first run's folder.
        pictures: Whether to draw each chart as a PNG file as well. These files are written to a folder beside the page;
            the folder has the name of the page without the extension.

    Returns:
        The path of the page.

    Raises:
        UserError: if a folder is not the folder of a run, if its metrics, samples or configuration cannot be parsed, if
            two folders are the same, or if the page cannot be written.
    """
    if out is not None and (out.is_dir() or not out.suffix):
        raise UserError(f"out should be a file, such as {out / 'report.html'}, not {out}")
    from lit_rlhf.report.charts import DARK, LIGHT, Table, make_charts, theme

    runs = [read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]
    out = out or (folders[0] if len(folders) == 1 else folders[0].resolve().parent) / "report.html"
    table = Table(runs)
    charts = make_charts(runs, table)
    data = {
        "runs": [run.name for run in runs],
        "rows": table.rows,
        "charts": [chart.spec for chart in charts],
        "themes": {"light": theme(dark=False) | {"background": "transparent"}, "dark": theme(dark=True)},
        "colors": {"light": LIGHT, "dark": DARK},
    }
    page = _render(runs, data, charts, table.left_out)
    try:
        _write(out, page)
        if pictures:
            _draw(out.with_suffix(""), charts, table.rows, theme(dark=False))
    except OSError as error:
        raise UserError(f"report: {out} cannot be written: {error}") from error
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each run: the last parts of its folder's path, as many as distinguish the runs.

    Raises:
        UserError: if two folders are the same.
    """
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("report: a run is named twice; each folder should be named once")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _render(runs: Sequence[Run], data: dict[str, Any], charts: Sequence[Any], left_out_rows: int) -> str:
    import jinja2

    from lit_rlhf.report.responses import responses_of

    responses, left_out = responses_of(runs)
    environment = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(HERE), trim_blocks=True)
    return environment.get_template("page.html").render(
        title=" and ".join(run.name for run in runs),
        summaries=[(run.name, run.config.get("model", ""), summarize(run)) for run in runs],
        differences=differences(runs) if len(runs) > 1 else {},
        sections={c.section: [n for n, other in enumerate(charts) if other.section == c.section] for c in charts},
        left_out_rows=left_out_rows,
        left_out_responses=left_out,
        responses=len(responses),
        has_reference=any("reference" in response for response in responses),
        data=_script(data | {"responses": responses}),
        libraries=_libraries(),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        code=(HERE / "page.js").read_text(encoding="utf-8"),
    )


def _script(data: Any) -> str:
    """Return data as JSON in which no HTML parser finds the end of a script."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _libraries() -> str:
    """Return a bundle of the JavaScript of Vega, Vega-Lite and Vega-Embed, which is cached between reports."""
    import vl_convert

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit-rlhf"
    file = cache / f"vega-{vl_convert.get_vega_version()}.js"
    if file.exists():
        return file.read_text(encoding="utf-8")
    code: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")
    with suppress(OSError):  # if the cache cannot be written, every report bundles the code again
        _write(file, code)
    return code


def _write(path: Path, text: str) -> None:
    """Write a file atomically, so that no reader sees a partly written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def _draw(folder: Path, charts: Sequence[Any], rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    for chart in charts:
        spec = chart.spec | {"datasets": {"rows": rows}}
        (folder / f"{chart.name}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=2, config=config))

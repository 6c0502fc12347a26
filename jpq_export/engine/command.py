"""What `jpq-export build` prints: a line a check, progress, the result; or one JSON document on stdout."""

from __future__ import annotations

import json
from typing import Any

import click

from jpq_export.engine import rtx
from jpq_export.engine.build import Job, describe, failed_path, prepare, run
from jpq_export.engine.preflight import failures
from jpq_export.engine.report import DeviceReport
from jpq_export.engine.settings import Settings
from jpq_export.errors import JpqError
from jpq_export.format.bundle import read_manifest


def build_bundle(settings: Settings, *, dry_run: bool, as_json: bool) -> None:
    """Check, build, report. JpqError (exit code 1) when a check or the recorded vectors fail."""
    if read_manifest(settings.bundle).engine:
        build_desktop(settings, dry_run=dry_run, as_json=as_json)
        return
    job = prepare(settings)
    failed = failures(list(job.checks))
    if not as_json:
        for check in job.checks:
            click.echo(check.line)
    steps = describe(job) if dry_run and not failed else []
    report = None if dry_run or failed else run(job, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps(document(job, steps, report), indent=1))
    if failed:
        raise JpqError(f"{settings.bundle}: {failed}")
    if report is None:
        for line in steps if not as_json else ():
            click.echo(line)
        return
    conclude(settings, report, quiet=as_json)


def build_desktop(settings: Settings, *, dry_run: bool, as_json: bool) -> None:
    """A bundle for a desktop GPU: its TensorRT-RTX engine is built here, into the bundle, and not run."""
    if dry_run:
        click.echo(
            f"engine: {rtx.GRAPH} -> {settings.bundle / rtx.ENGINE}, TensorRT-RTX {rtx.installed() or 'missing'}"
        )
        return
    engine = rtx.rebuild(settings.bundle, context=settings.max_tokens)
    from jpq_export.parity.report import write_report  # not at the top: boards have no jinja2

    write_report(settings.bundle)
    click.echo(json.dumps(engine.to_dict(), indent=1) if as_json else engine.line)


def document(job: Job, steps: list[str], report: DeviceReport | None) -> dict[str, Any]:
    """The JSON of one call; `report` is device.json's content when something was built."""
    return {
        "passed": all(check.passed for check in job.checks) and (report is None or report.passed),
        "checks": [check.to_dict() for check in job.checks],
        "device": job.device.to_dict(),
        "steps": steps,
        "report": json.loads(report.to_json()) if report else None,
    }


def conclude(settings: Settings, report: DeviceReport, *, quiet: bool) -> None:
    """Say how it went; JpqError when the engine computes something else than what was recorded."""
    if not report.passed:
        wrong = next((row for row in report.parity.rows if not row.passed), None)
        what = "greedy tokens" if wrong is None else f"{wrong.name} (error {wrong.rel_rms:.1e})"
        raise JpqError(
            f"{failed_path(settings.out)}: the engine computes other numbers than recorded, first in {what}; "
            f"see {settings.home / 'device.html'}; report it with device.json"
        )
    if not quiet:
        speed = report.speed
        click.echo(f"{settings.out}: parity holds; decode {speed.decode_tokens_per_s:.1f} tokens/s")
        click.echo(f"report: {settings.home / 'device.html'}")

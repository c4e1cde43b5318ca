"""`lorafit data` as one straight line: rows -> what the model would read of them -> a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lorafit import files
from lorafit.config import DataConfig
from lorafit.data.added import add_tokens, told
from lorafit.data.encode import Data, Reading, encode_source
from lorafit.data.labels import names_of, task_of
from lorafit.data.load import Source, locate
from lorafit.data.preflight import as_json, inspect
from lorafit.data.progress import counting
from lorafit.data.show import page, print_report
from lorafit.data.template import use_template
from lorafit.model import load as model_load
from lorafit.model import spec as model_spec


def look(config: DataConfig, log: Console, out: Console | None) -> dict[str, Any]:
    """Report on data. out: where the report is printed, None for nowhere. Returns it as JSON.

    Raises LorafitError for whatever the user can mend.
    """
    located = locate(config.data)
    spec = model_spec.read(config.model)
    tokenizer = model_load.load_tokenizer(spec, config.trust_remote_code)
    if config.template:
        use_template(tokenizer, config.template)
    if config.add_tokens:
        log.print(told(add_tokens(tokenizer, config.add_tokens), new_rows=0), highlight=False, markup=False)
    found, task = None, task_of(located.train(), config.format, config.rename)
    if task != "generate":
        found = names_of(located.train().rows(), config.format, config.rename, config.skip_bad, task)
    reading = Reading(config.format, config.rename, config.skip_bad, config.loss_on, config.seq_len, found)

    def encoded(source: Source) -> Data:
        with counting(log, source.name) as on_rows:
            return encode_source(source, tokenizer, reading, on_rows)

    other = locate(config.against).unseen() if config.against else located.sides.get("test") or located.held_out()
    train = encoded(located.train())
    report = inspect(config.data, train, tokenizer, encoded(other) if other else None, config.samples)
    if out:
        print_report(report, out)
    if config.html:
        files.write_atomic(Path(config.html), page(report, config.model))
        log.print(f"wrote {config.html}", highlight=False)
    return as_json(report) | {"model": config.model}

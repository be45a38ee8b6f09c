"""Audit a split of the trainer's rows once per content, and keep what was found beside the prepared rows."""

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from datasets import Dataset
from filelock import FileLock

from medibot.data.gate import Audit, spans
from medibot.data.prepared import Prepared
from medibot.data.splitting import sha256

# The version of what the gate checks. Raise it by hand when it refuses other rows: records of before then prove nothing.
GATE = 3
COUNTS = ["rows_in", "rows_out", "tokens", "supervised", "longest", "violations"]


def audit_once(prepared: Prepared, split: str, rows: Dataset, limit: int | None) -> Audit:
    """Return the audit of the trainer's `rows` of a split; of rows that were audited before, as it was written down.

    Under several processes, and between two trainings, the first to come audits and the others read.
    """
    stops, conversations = prepared.generation.eos_token_id, prepared.load(split)
    # Each process hashes the rows that it will itself train on: a record excuses no others
    decisive = [GATE, transformers.__version__, tokenizers.__version__, prepared.fingerprint, split, stops, limit]
    key = sha256(json.dumps([*decisive, hash_rows(rows)]))
    path = prepared.folder / f"gate-{key[:32]}.json"
    # A file lock, not a process-group barrier: auditing a million rows cannot time out
    with FileLock(prepared.folder / "gate.lock"):
        record = read_record(path, key)
        audit = Audit(rows, conversations, prepared.tokenizer, stops, limit, split, record)
        if record is None:
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"key": key} | {name: vars(audit)[name] for name in COUNTS}))
            partial.replace(path)
    return audit


def read_record(path: Path, key: str) -> dict[str, Any] | None:
    """Return what was found in the rows of `key`; None if nothing whole is there."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return (
        {name: record[name] for name in COUNTS} if record.keys() == {"key", *COUNTS} and record["key"] == key else None
    )


def hash_rows(rows: Dataset) -> str:
    """Return a hash of all that the gate reads of the trainer's rows, through slices and indices."""
    digest = hashlib.blake2b(json.dumps([len(rows), "seq_lengths" in rows.column_names]).encode())
    for ids, labels in spans(rows):
        digest.update(f"{len(ids)} {len(labels)};".encode())
        digest.update(ids.tobytes() + labels.tobytes())
    return digest.hexdigest()

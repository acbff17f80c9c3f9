"""What two runs have in common when they are the same."""


def without_times(records):
    """The records without times, speeds and memory: what a resumed run repeats exactly."""
    return [{k: v for k, v in record.items() if not _measured(k)} for record in records]


def _measured(name):
    return name in ("time", "mfu", "seconds_per_step") or name.endswith(
        ("_seconds", "_per_second", "_mb")
    )

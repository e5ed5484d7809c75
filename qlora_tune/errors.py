"""What a user can be told: every expected failure, raised with a message that needs no traceback."""

MAX_LISTED = 20


class TuneError(Exception):
    """An expected failure. The message says where, what was found, what was expected and what to do."""


class ConfigError(TuneError):
    """A setting, preset or config file is wrong."""


class DataError(TuneError):
    """A data file can't be used."""


class TemplateError(TuneError):
    """A chat template can't be used, or an assistant turn can't be located in what it renders."""


class ModelError(TuneError):
    """A base model or adapter can't be found, loaded, or does not fit the other."""


class MemoryLimitError(TuneError):
    """The device's memory does not hold what was asked."""


class RunError(TuneError):
    """A run's folder is missing, damaged, or in a state that forbids what was asked."""


class ExportError(TuneError):
    """What was exported did not answer as the trained model did, or can't be written."""


def join_problems(heading: str, problems: list[str]) -> str:
    """List problems under a heading, at most 20 of them and a count of the rest."""
    shown = [f"  - {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        shown.append(f"  … and {len(problems) - MAX_LISTED} more.")
    return "\n".join([heading, *shown])

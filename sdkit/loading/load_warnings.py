"""What the libraries below warn of while they load: collected for the report, and still shown."""

import logging
import re
import warnings
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from sdkit.validation import ValidationError


@contextmanager
def collect_warnings(progress):
    """Collects what Python, diffusers and transformers warn of; all of it is shown as ever.

    But for one: transformers tells everyone who has no torchvision that it does well without.

    Args:
        progress: Whether diffusers and transformers show their progress bars.

    Yields:
        A list of lines, which fills; the warnings of Python itself come in at the end.
    """
    collected = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: collected.append(_one_line(record.getMessage()))
    loggers = [logging.getLogger("diffusers"), logging.getLogger("transformers")]
    quieted = [*(h for logger in loggers for h in logger.handlers), handler]
    toolkits = (diffusers_logging, transformers_logging)
    bars = [toolkit for toolkit in toolkits if toolkit.is_progress_bar_enabled()]
    for one in quieted:
        one.addFilter(_is_worth_telling)
    for logger in loggers:
        logger.addHandler(handler)
    for toolkit in bars:
        if not progress:
            toolkit.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield collected
    finally:
        for one in quieted:
            one.removeFilter(_is_worth_telling)
        for logger in loggers:
            logger.removeHandler(handler)
        for toolkit in bars:
            toolkit.enable_progress_bar()
    for seen in caught:
        collected.append(f"{seen.category.__name__}: {_one_line(seen.message)}")
        warnings.warn_explicit(seen.message, seen.category, seen.filename, seen.lineno)


def _one_line(message):
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(message)).split())


def _is_worth_telling(record):
    return "requires torchvision (not installed)" not in record.getMessage()


def refuse_invented_weights(collected, asked):
    """Refuses a model whose file lacks weights: upstream fills them with noise and merely warns.

    Args:
        collected: What `collect_warnings` collected.
        asked: The model, for the message.

    Raises:
        ValidationError: Some weights were not in the file.
    """
    for message in collected:
        if "newly initialized" in message or "| MISSING |" in message:
            raise ValidationError(
                f"{asked}: weights are missing in the file and would be random ({message[:300]}). "
                "Copy or download the model again."
            )

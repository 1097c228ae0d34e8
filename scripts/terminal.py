"""Output where not every character can be shown: plain letters instead, never an error."""

import codecs
import sys

_FALLBACK = "fedllm-plain"
_PLAIN = {
    "\u00b7": "|",
    "\u2026": "~",
    "\u2192": ">",
    "\u2013": "-",
    "\u2014": "-",
    "\u00d7": "x",
}  # one for one


def make_output_plain() -> None:
    """Let stdout and stderr write what their encoding lacks as ASCII: signs as their like, others escaped.

    Escapes rather than question marks: two names in Korean must not look the same.
    """
    codecs.register_error(_FALLBACK, _plain)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what stands in for them in a test or a notebook may not have it
            stream.reconfigure(errors=_FALLBACK)


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    escaped = (_PLAIN.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in text)
    return "".join(escaped), error.end

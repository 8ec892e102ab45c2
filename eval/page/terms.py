"""The page's technical words in a line each, shown where they first stand."""

import re

from markupsafe import Markup, escape

TERMS = {
    "HF gain": "energy of the finest detail (half of all frequencies) against the reference's in dB: 0 as much, below 0"
    " lost, above 0 added",
    "kurtosis ratio": "how much edges stand out from the rest of the fine detail, over the reference's: 1 alike, near 0"
    " the detail is noise",
    "flat noise": "fine energy where the picture is smooth, against the reference's in dB: above 0 noise was added",
    "fd_wavelet": "a distance between the statistics of fine detail of two sets; 0 alike",
    "fd_classifier": "a distance between what a small classifier sees in two sets; 0 alike",
    "null": "what other images of the reference's own source would read: a number is large only beside it",
    "LSD": "log-spectral distance: how far the whole spectrum is off, in dB",
    "diversity": "how different samples of one class are, over the reference's: below 1 less so",
    "saturation ratio": "strength of colours over the reference's",
    "contrast ratio": "differences of brightness within a picture, over the reference's",
    "colour speckle": "fine noise of colour against the reference's in dB",
}
KNOWN = re.compile("|".join(rf"\b{re.escape(term)}\b" for term in sorted(TERMS, key=len, reverse=True)))


def explained(text: str) -> Markup:
    """Escaped, each of TERMS with its meaning to point at."""
    parts, end = [], 0
    for found in KNOWN.finditer(str(text)):
        parts += [
            escape(text[end : found.start()]),
            Markup('<abbr title="{}">{}</abbr>').format(TERMS[found[0]], found[0]),
        ]
        end = found.end()
    return Markup("").join([*parts, escape(text[end:])])


def terms_of(texts: list[str]) -> dict[str, str]:
    """The TERMS that stand in the texts, in the order in which they first do."""
    found = [term for text in texts for term in KNOWN.findall(text)]
    return {term: TERMS[term] for term in dict.fromkeys(found)}

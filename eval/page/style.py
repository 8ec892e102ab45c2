"""The colours of a report's page, in light and dark. Every text colour has a contrast of 4.5 on its background."""

INK = {"ink": "#1b1f24", "soft": "#57606a", "line": "#d5dae0", "paper": "#ffffff", "tint": "#f4f6f8"}
INK_DARK = {"ink": "#e6e9ed", "soft": "#9aa4af", "line": "#3a414a", "paper": "#15181c", "tint": "#1f242a"}
WORDS = {
    "preserved": "#00724a",
    "reduced": "#b33f00",
    "inflated": "#8a5b00",
    "energy-only": "#a03a78",
    "inconclusive": "#57606a",
    "colour-ok": "#00724a",
    "colour-fault": "#b33f00",
    "colour-inconclusive": "#57606a",
}
WORDS_DARK = {
    "preserved": "#3fd6a5",
    "reduced": "#ff8f4d",
    "inflated": "#f0b429",
    "energy-only": "#e79cc8",
    "inconclusive": "#9aa4af",
    "colour-ok": "#3fd6a5",
    "colour-fault": "#ff8f4d",
    "colour-inconclusive": "#9aa4af",
}

"""How a report's page looks, and its glossary. Every text colour has a contrast of 4.5 on its background."""

INK = {"ink": "#1b1f24", "soft": "#57606a", "line": "#d5dae0", "paper": "#ffffff", "tint": "#f4f6f8"}
INK_DARK = {"ink": "#e6e9ed", "soft": "#9aa4af", "line": "#3a414a", "paper": "#15181c", "tint": "#1f242a"}
WORDS = {
    "preserved": "#00724a",
    "reduced": "#b33f00",
    "inflated": "#8a5b00",
    "energy-only": "#a03a78",
    "inconclusive": "#57606a",
}
WORDS_DARK = {
    "preserved": "#3fd6a5",
    "reduced": "#ff8f4d",
    "inflated": "#f0b429",
    "energy-only": "#e79cc8",
    "inconclusive": "#9aa4af",
}


def _variables(colours: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


STYLE = (
    f"""
:root {{ color-scheme: light dark; {_variables(INK)} {_variables(WORDS)} }}
@media (prefers-color-scheme: dark) {{
  :root {{ {_variables(INK_DARK)} {_variables(WORDS_DARK)} }}
}}
{" ".join(f".{word} {{ color: var(--{word}); }}" for word in WORDS)}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 84rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.8rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 46rem; }
ul { padding-left: 1.2rem; }
.soft, figcaption { color: var(--soft); font-size: .92rem; }
figcaption { max-width: 46rem; margin-bottom: .5rem; }
.wide { overflow-x: auto; max-width: 100%; }
.wide:focus-visible, summary:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .4rem 0 .4rem .9rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; white-space: normal; line-height: 1.25; }
th:first-child, td:first-child { text-align: left; color: var(--ink); padding-left: 0; font-weight: 400;
  position: sticky; left: 0; background: var(--paper); padding-right: .4rem; max-width: 14rem; white-space: normal;
  vertical-align: top; overflow-wrap: anywhere; min-width: 8rem; }
thead th:first-child { vertical-align: bottom; }
.texts :is(th, td) { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 7rem; }
.verdicts :is(th, td):nth-child(2) { text-align: left; }
td small, th small { display: block; color: var(--soft); font-weight: 400; }
.verdict { display: inline-block; padding: 0 .55rem; border-radius: 1rem; border: 1.5px solid; font-weight: 600;
  white-space: nowrap; }
.answers { list-style: none; padding: 0; }
.answers li { border-left: 4px solid var(--line); padding: .15rem 0 .15rem .8rem; margin: .6rem 0; max-width: 50rem; }
.answers b { margin-right: .4rem; }
.answers small { display: block; color: var(--soft); font-size: .92rem; }
figure { margin: 0 0 .6rem; }
figure img { display: block; height: auto; background: #fff; border-radius: 6px; padding: .5rem; }
figure.chart img { width: 100%; min-width: 36rem; max-width: 60rem; }
figure.grid img { max-width: max(100%, 56rem); }
details { margin: .4rem 0 1rem; }
summary { cursor: pointer; color: var(--soft); font-size: .92rem; padding: .25rem 0; }
pre { background: var(--tint); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .85rem;
  max-width: 100%; }
code { font-size: .92em; overflow-wrap: anywhere; }
dt { font-weight: 600; overflow-wrap: anywhere; }
dd { margin: 0 0 .6rem; max-width: 46rem; color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  th:first-child, td:first-child { max-width: 7.5rem; min-width: 6rem; }
  th, td { padding-left: .8rem; }
}
@media (max-width: 37rem) { .chart figcaption::after { content: " Wider than this screen: scroll it sideways."; } }
@media print { .wide { overflow: visible; } }
"""
)

GLOSSARY = (
    (
        "Verdict",
        "preserved: HF gain and structure within their margins. reduced, inflated: the gain is outside. energy "
        "only: the gain is right and the structure wrong. inconclusive: an interval straddles a margin.",
    ),
    (
        "HF gain (gain_db.y.HF)",
        "10 log10 of the energy between 1/4 and 1/2 cycle per pixel over the reference's, pooled over images. "
        "0 preserved, below 0 lost, above 0 added, which is a failure as well. gain_db_median: the median over pairs "
        "of samples with equal noise and class.",
    ),
    (
        "Kurtosis ratio (hf_kurtosis_ratio)",
        "Ratio of the medians of the excess kurtosis of the finest diagonal wavelet band. Edges give heavy tails, "
        "noise does not: near 0 the energy is there but the structure is not.",
    ),
    ("Flat noise (flat_noise_db)", "Fine energy in the flattest tenth of 8-px patches against the reference."),
    (
        "Parent-child difference",
        "Difference of the medians of the correlation of log |HH| between neighbouring scales. Below 0: scales agree "
        "less than in the reference.",
    ),
    (
        "fd_wavelet, fd_pca, fd_classifier",
        "Squared Frechet distances over 20 wavelet statistics, over principal components of the pixels, and over the "
        "features of a small classifier. Components and classifier are fitted to images of their own, where these can "
        "be had. None is an FID; none compares with a published "
        "number. Over null: minus what another set of the reference's source and this size would read.",
    ),
    (
        "Sliced Wasserstein",
        "Distance between patches of each level of a Laplacian pyramid, the finest first, in standard deviations of "
        "the reference's patches; beside it the null.",
    ),
    (
        "KID, precision, recall",
        "Unbiased kernel distance over seeded subsets; share of images near real ones and the reverse, over 3 nearest "
        "neighbours. They depend on the number of images: compare within a report only.",
    ),
    ("LSD (lsd)", "Root mean square of the curve in dB over logarithmic frequency, and its signed mean."),
    (
        "Grid peak (grid_peak_db)",
        "Log power at the frequencies of columns (x) and rows (y) of period 2, 4, 8 and 16 pixels minus the median "
        "beside them. Above 0: a checkerboard or the seams of patches.",
    ),
    (
        "Diversity",
        "Mean distance within a class against the reference's, in pixels and in wavelet statistics; the least of the "
        "classes.",
    ),
    ("Null", "What images of the reference's own source would read at these sizes. A dash: there is none."),
    ("Interval", "95 % bootstrap over images, within classes, in pairs where noise and class are shared."),
)

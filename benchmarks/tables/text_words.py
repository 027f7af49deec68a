"""What the page on text says beside its tables."""

HEAD = """# Results on text

Written by `python -m benchmarks.tables` from the files under `benchmarks/results/`; below each
table stand the command and commits that made its runs. English prose of 15 MB (Austen, Shakespeare
and Milton, the King James and Web Bibles), of each book the last twentieth held out; losses are
validation losses in nats per byte, the mean over seeds, and every method is tuned with the same
number of trials. Small models, a few hundred steps, one core: read rankings and ratios, not the
losses themselves.
"""

FINDINGS = """## Which optimizer, for a small language model?

{answers}

Ahead or behind: p < .05 after Holm's correction, {seeds} seeds. The order is that of a few
hundred steps at 0.66 M parameters; the sections below show how it moves with the number of steps.
"""

NEURMS = """\
Variant U with momentum .9; unit factors are bounded by s_max = 100 in `neurms-u`, by nothing in
`unclipped`, and in `relative-kappa=k` to within k times the layer's median factor, k being 10 in
`relative` with something else beside it. An absolute bound means something else in every layer, a
relative one does not. `head-to-adamw` leaves the last layer to AdamW, as the other methods do;
warmup is 10 % of the steps where nothing is said, for AdamW as well."""

RACS = """\
The paper's averages start at zero and are not corrected (`racs`), so that its first updates are
up to 10 times too long; `corrected` divides by 1 - beta^t. With warmup it makes no difference.
Without, the paper's form needs a rate a quarter as high and ends up worse: see the last rows."""

ALICE = """\
All at the rate that is best for Alice, with one part changed: `none-of-them` keeps the subspace
by its leading directions, without tracking, switching and compensation. As in the paper's own
ablation (26.96, 27.35, 25.11 and, with all, 21.95) the compensation is what counts; tracking
costs state and gives nothing here (`alice-0` goes without it)."""

SHARED = """\
Rank 8 of 64, every variant with a search of its own. It is not the blocks that fail, by these
means, but what is done with their updates. The paper's momentum sums updates that were each made
from one step's gradient; without momentum, or with an average of the gradients that is taken before
the blocks see them (`momentum-first`, the order of Muon, RMNP and Alice and not the paper's), the
same blocks reach AdamW or pass it. Adam's length in the place of RMSPROP_NORMALIZED's, which has no
bias correction and a shorter memory, helps as well, and most with that average. Forgetting old
statistics changes next to nothing."""

LEADS = (
    ("neurms", "NeuRMS on text", NEURMS, "U,unclipped"),
    ("racs", "RACS: bias correction and the first steps", RACS, "methods:racs"),
    ("alice", "What Alice's parts are worth", ALICE, "methods:alice"),
    ("shared_basis", "Why SharedBasis fails on text", SHARED, "methods:shared_basis"),
)
"""Group, title, text, and the row that every change is set against."""

SUMMARY = """## A small LLaMA on English prose

{table}

{made}

[Results on text](text.md) explains the columns, and has more methods, a GPT-2, tags, and
what was tried where a method does not hold up.
"""

"""The sections of the page on text, with places for what the results say."""

LLAMA = """## A small LLaMA, {steps} steps

RMSNorm, rotary positions, SwiGLU; bytes as tokens, 3 layers, width 128, 0.66 M parameters, batch
{batch} x {context}. Each method had four learning rates of {tune} steps each, and up to two more
while the best was the outermost; then seeds at the best. Embedding, head and norms go to AdamW at
the rate that is best for AdamW alone. Perplexity per byte is exp(loss); per word it is of
{bytes_per_word:.2f} bytes. *Step ratio*: AdamW's steps over the method's to AdamW's final loss;
*throughput*: AdamW's milliseconds a step over the method's, measured in one run of
`benchmarks.llama_step`; *speed-up* is their product, the papers' effective throughput. Above 1 is
better than AdamW, a dash means that its loss was not reached. p: paired t-test by seed against
AdamW, Holm's correction over the rows. RMNP's momentum of .8 was tried after its own of .95 had
come out behind. `neurms-u` bounds its factors by s_max = 100, `neurms-relative` to within 10 times
the layer's median; `alice-0` is Alice without tracking.

{table}

{variants}{made}
"""

SMALL = """## More methods, at a smaller scale

2 layers, width 64, 0.13 M parameters, batch 8 x 64, {steps} steps: small enough to tune everybody
at the full number of steps. Three rates each, and up to three more while the best was the
outermost; the seeds of the table were not tuned on. Low-rank methods have rank 16 of 64 and renew
their subspace every 50 steps, Alice keeps 5 directions of it. Memory is the optimizer's state as
measured; `memory_report` predicts the same number of bytes in every row{exception}.

{table}

{made}
"""

LEADS = """## {title}

{text}

{table}

{made}
"""

GPT2 = """## A small GPT-2, and dominance

LayerNorm, GELU, learned positions, tied head; {parameters:.2f} M parameters, width {width},
{layers} layers, batch {batch} x {context}, {steps} steps. With so few bytes a step seeds differ
much; read the order of the losses, not the step ratio.

{table}

RMNP normalises rows where Muon whitens; the two agree where V V^T of the momentum is diagonal. The
ratios r_i = (V V^T)_ii / mean |(V V^T)_ij| of the hidden matrices over training, mean over the
seeds: average over units and layers, least and greatest. Rows of independent numbers would have
about sqrt(pi n / 2): {independent:.0f} at n = {width}.

{dominance}

With averages of 2 to 4 the diagonal hardly dominates here: the units of a layer share much of their
direction, which Muon takes out and RMNP leaves in. That fits RMNP's distance to Muon above.

![Dominance ratios over training](figures/text-dominance.svg)

{made}
"""

SHAPES = """## RMNP's step against Muon's, by matrix shape

One whole optimizer step on every hidden matrix of a model, float32, {threads} threads, medians of
interleaved rounds; each distinct shape measured once and counted as often as it occurs.

{table}

The paper reports 12.9 (60M) to 44.3 (770M) and 42.9 (1.5B) on a GPU, whose matrix units make Muon's
products cheap. On a CPU they are not, and the gap is wider.

{made}
"""

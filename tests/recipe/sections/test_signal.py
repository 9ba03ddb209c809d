"""train.signal and train.teacher: what they need, and what they do not go with."""

from tests.recipe.recipe_text import TINY, bad_recipes, refused_with

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "kind",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: logit}"),
        (),
        "train.signal.kind: got 'logit'; allowed: labels, logits, mix, layers, dpo, orpo; did you mean "
        "'logits'?",
    ),
    (
        "no teacher",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: logits}"),
        (),
        "train.teacher: missing, and train.signal.kind: logits asks a teacher; set one of residual",
    ),
    (
        "nobody asks",
        ("max_steps: 10", "max_steps: 10\n  teacher: residual"),
        (),
        "train.teacher: got 'residual', but train.signal.kind: labels asks no teacher; remove it, or set "
        "train.signal.kind (with a teacher: logits, mix, layers)",
    ),
    (
        "not read",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: logits, label_weight: 0.2}\n  teacher: residual"),
        (),
        "train.signal: got label_weight 0.2, which kind: logits does not read; remove it, or set kind: mix",
    ),
    (
        "temperature",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: mix, temperature: 0}\n  teacher: residual"),
        (),
        "train.signal.temperature: got 0; allowed: greater than 0",
    ),
    (
        "mistyped",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: mix}\n  teacher: residuals"),
        (),
        "train.teacher: got 'residuals', which is no folder here; did you mean 'residual'?; allowed: ",
    ),
    (
        "no such folder",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: mix}\n  teacher: /there/is/none"),
        (),
        "train.teacher: got '/there/is/none', but there is no such folder, and no hub id looks like it",
    ),
    (
        "no residual",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: mix}\n  teacher: residual"),
        ("quant.residual_bits=0",),
        "train.teacher: got 'residual', but this base keeps no residual; set quant.residual_bits: 4",
    ),
    (
        "residual of moved weights",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: mix}\n  teacher: residual"),
        ("quant.calibrate=auto",),
        "train.teacher: got 'residual', but quant.calibrate: gptq moves the weights before it rounds them",
    ),
    (
        "more tokens than there are",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: mix, top_k: 4097}\n  teacher: cached"),
        (),
        "train.signal.top_k: got 4097; allowed: at most the 4096 tokens of the model, or null",
    ),
    (
        "no step",
        ("max_steps: 10", "max_steps: 0\n  reconstruct: {}\n  signal: {kind: mix}\n  teacher: cached"),
        (),
        "train.signal.kind: got 'mix' with max_steps 0: no step is trained, and no teacher asked",
    ),
    (
        "layers of a teacher that keeps none",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: layers}\n  teacher: cached"),
        (),
        "train.teacher: got 'cached', which keeps answers and no layers, and train.signal.kind: layers",
    ),
    (
        "layers that are run again",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: layers}\n  teacher: residual"),
        ("train.gradient_checkpointing=true",),
        "train.gradient_checkpointing: got True with signal.kind: layers: a layer that is run again",
    ),
    (
        "scores that flash attention has not",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: layers}\n  teacher: residual"),
        ("model.attention=flash_attention_2",),
        "model.attention: got 'flash_attention_2', which never has the scores of attention in memory",
    ),
    (
        "an intervention without a backward",
        (
            "max_steps: 10",
            "max_steps: 10\n  signal: {kind: layers, intervention: {}}\n  teacher: residual\n"
            "  gradient: {kind: fogzo}",
        ),
        (),
        "train.gradient.kind: got 'fogzo' with an intervention, which says where a backward stops",
    ),
    (
        "an intervention in another signal",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: mix, intervention: {}}\n  teacher: residual"),
        (),
        "which kind: mix does not read; remove it, or set kind: layers",
    ),
    (
        "an intervention of no kind",
        ("max_steps: 10", "max_steps: 10\n  signal: {kind: layers, intervention: {mode: graduel}}"),
        (),
        "train.signal.intervention.mode: got 'graduel'; allowed: gradual, inverted, stochastic, map, "
        "context, output; did you mean 'gradual'?",
    ),
    (
        "boundaries that nobody reads",
        (
            "max_steps: 10",
            "max_steps: 10\n  signal: {kind: layers, intervention: {mode: map, boundaries: [1/6, 1/3]}}",
        ),
        (),
        "which mode: map does not read; remove it, or set mode: gradual or inverted",
    ),
    (
        "nothing to learn",
        (
            "max_steps: 10",
            "max_steps: 10\n  signal: {kind: layers, losses: {logits: 0, hidden: 0, scores: 0, outputs: 0}}",
        ),
        (),
        "train.signal: got losses are all 0, so nothing is learned",
    ),
    (
        "layers in another basis",
        ("max_steps: 10", f"max_steps: 10\n  signal: {{kind: layers}}\n  teacher: {TINY}"),
        ("quant.rotation={kind: hadamard}",),
        "whose layers are in the basis of the files, and quant.rotation or smooth turns the model's",
    ),
    (
        "a word for the section",
        ("max_steps: 10", "max_steps: 10\n  signal: mix"),
        (),
        "train.signal: got 'mix'; allowed: a mapping with the keys kind, losses, intervention, temperature",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)

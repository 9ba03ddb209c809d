"""The train section: what its options need."""

from tests.recipe.recipe_text import bad_recipes, refused_with

BAD = [
    # (what, changed text, overrides, place and words that must be in one line)
    (
        "unknown key",
        ("max_steps: 10", "max_steps: 10\n  stpes: 3"),
        (),
        "r.yaml:19: train.stpes: unknown key; did you mean",
    ),
    (
        "a key that is set, mistyped",
        ("max_steps: 10", "max_steps: 10\n  max_stepz: 3"),
        (),
        "r.yaml:19: train.max_stepz: unknown key; did you mean 'max_steps'",
    ),
    (
        "number",
        ("learning_rate: 1e-4", "learning_rate: fast"),
        (),
        "r.yaml:19: train.learning_rate: got 'fast'; allowed: a number",
    ),
    (
        "bool for number",
        ("max_steps: 10", "max_steps: true"),
        (),
        "r.yaml:18: train.max_steps: got True; allowed: a number",
    ),
    (
        "missing section",
        ("train:\n  max_steps: 10\n  learning_rate: 1e-4\n", ""),
        (),
        "train: got max_steps None and epochs None; allowed: exactly one",
    ),
    (
        "both lengths",
        ("max_steps: 10", "max_steps: 10\n  epochs: 2"),
        (),
        "r.yaml:17: train: got max_steps 10 and epochs 2.0; allowed: exactly one",
    ),
    (
        "no step of training",
        ("max_steps: 10", "max_steps: 0"),
        (),
        "r.yaml:17: train: got max_steps 0 without reconstruct trains nothing; set max_steps: 1 or more",
    ),
    (
        "fitted, then rounded again",
        ("max_steps: 10", "max_steps: 10\n  reconstruct: {}"),
        ("adapter={method: lora}",),
        "r.yaml:19: train.reconstruct: got a section, but lora is merged by rounding again",
    ),
    (
        "fitted, then started again",
        ("max_steps: 10", "max_steps: 10\n  reconstruct: {}"),
        ("adapter={method: l4q, warmup_steps: 2}",),
        "adapter.warmup_steps: got 2 with train.reconstruct",
    ),
    (
        "one state to keep",
        ("max_steps: 10", "max_steps: 0\n  reconstruct: {}\n  keep_best: true"),
        (),
        "r.yaml:20: train.keep_best: got true with max_steps 0: there is one state",
    ),
    (
        "nothing to wait for",
        ("max_steps: 10", "max_steps: 10\n  stop_after: 3"),
        (),
        "train.stop_after: got 3, and what it waits for is a better checkpoint; set keep_best: true",
    ),
    (
        "noise in no step",
        ("max_steps: 10", "max_steps: 0\n  reconstruct: {}\n  neftune_alpha: 5"),
        (),
        "train.neftune_alpha: got 5 with max_steps 0: there is no step to make noise in",
    ),
    (
        "steps of a layer",
        ("max_steps: 10", "max_steps: 10\n  reconstruct: {steps: 0}"),
        (),
        "r.yaml:19: train.reconstruct.steps: got 0; allowed:",
    ),
    (
        "unknown inputs",
        ("max_steps: 10", "max_steps: 10\n  reconstruct: {inputs: both}"),
        (),
        "r.yaml:19: train.reconstruct.inputs: got 'both'; allowed:",
    ),
    (
        "nothing to keep",
        ("rank: 8", "rank: 8\n"),
        ("adapter={method: lora}", "train.keep_codes=true"),
        "train.keep_codes: got true, but lora rounds nothing while it trains",
    ),
    (
        "kept codes of shards",
        ("max_steps: 10", "max_steps: 10\n  keep_codes: true\n  sharding: fsdp"),
        (),
        "r.yaml:19: train.keep_codes: got true with train.sharding: fsdp, where no "
        "process holds whole layers",
    ),
    (
        "optimizer",
        ("max_steps: 10", "max_steps: 10\n  optimizer: adamw8bits"),
        (),
        "r.yaml:19: train.optimizer: got 'adamw8bits'; allowed: adamw",
    ),
    (
        "eval without data",
        ("max_steps: 10", "max_steps: 10\n  eval_every: 5"),
        (),
        "r.yaml:19: train.eval_every: got 5, but there is no data.valid",
    ),
    (
        "best without eval",
        ("max_steps: 10", "max_steps: 10\n  keep_best: true"),
        (),
        "r.yaml:19: train.keep_best: got true, but nothing is evaluated",
    ),
    (
        "streaming epochs",
        ("max_steps: 10", "epochs: 2"),
        ("data.streaming=true",),
        "r.yaml:18: train.epochs: got 2 with data.streaming",
    ),
    (
        "wsd ratios",
        ("max_steps: 10", "max_steps: 10\n  scheduler: wsd\n  decay_ratio: 1.0"),
        (),
        "r.yaml:20: train.decay_ratio: got 1.0; with warmup_ratio the sum is 1.05",
    ),
    (
        "fused loss on a CPU",
        ("max_steps: 10", "max_steps: 10\n  loss: liger"),
        (),
        "its kernels run on a GPU only; set loss: chunked",
    ),
    (
        "fused loss of a packed head",
        ("max_steps: 10", "max_steps: 10\n  loss: liger"),
        ("quant.lm_head=8",),
        "quant.lm_head packs the head in 8 bits",
    ),
    (
        "offload without checkpointing",
        ("max_steps: 10", "max_steps: 10\n  offload: disk"),
        (),
        "gradient_checkpointing: true, or offload: no",
    ),
    (
        "rows chosen anew in no step",
        ("max_steps: 10", "max_steps: 0\n  reconstruct: {}"),
        ("adapter={method: ef_qat, importance: weight_input}",),
        "train.max_steps: got 0, but adapter ef_qat chooses its rows anew between steps of training",
    ),
    (
        "bf16 masters, 8-bit averages",
        ("name: test", "name: test"),
        ("adapter={method: full_qat, master: bf16}", "train.optimizer=adamw8bit"),
        "train.optimizer: got 'adamw8bit', which steps on fp32 alone, and adapter.master is bf16; set",
    ),
    (
        "bf16 masters, fp16",
        ("name: test", "name: test"),
        ("adapter={method: full_qat, master: bf16}", "train.mixed_precision=fp16"),
        "train.mixed_precision: got 'fp16', whose loss scaler is for fp32, and adapter.master is bf16",
    ),
    (
        "no masters, a fit",
        ("name: test", "name: test"),
        ("adapter={method: ef_qat, master: none}", "train.reconstruct={}"),
        "train.reconstruct: got a fit, whose optimizer steps on fp32 alone, and adapter.master is none",
    ),
    (
        "no masters, no momentum",
        ("name: test", "name: test"),
        ("adapter={method: full_qat, master: none}", "train.betas=[0, 0.9]"),
        "train.betas: got a first of 0 with adapter.master none",
    ),
    (
        "no masters, a pull",
        ("name: test", "name: test"),
        ("adapter={method: full_qat, master: none}", "train.gradient={cage: {}}"),
        "adapter.master: got 'none' beside gradient.cage, which moves weights by less than it holds",
    ),
]


@bad_recipes(BAD)
def test_bad_recipe_is_refused_with_its_line(change, overrides, words):
    refused_with(change, overrides, words)

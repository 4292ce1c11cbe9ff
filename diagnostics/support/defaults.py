"""Defaults that the library and the commands share: one place, so that both show the same. Imports nothing."""

# Prompts
CONTEXT_LENGTH = 1024  # tokens of a built-in prompt

# Diagnosis
DECODE_TOKENS = 48  # reference tokens per prompt
ANCHORS = 1  # leading tokens that keep their KV in all layers
LENS_POSITIONS = 4  # decode positions per prompt that the logit lens reads
DETAIL_PROMPTS = 7  # prompts whose tokens are kept

# Recommendation
MAX_KL = 0.1  # nats per token
CONFIDENCE = 0.95  # of the bound that must meet the goal, and of the intervals of scores

# Evaluation
QUERY = "prompt"  # how the query about a document is placed
MARGIN = 0.02  # of non-inferiority, as a share of the score
RETRIEVAL_ITEMS = 100  # items of a generated retrieval task

# Benchmark
REPEATS = 5
NEW_TOKENS = 32

# Fine-tuning
EXAMPLES = 384  # built-in rows to train on
HELD_OUT_PROMPTS = 24  # built-in prompts to measure on
TRAINING_CONTEXT_LENGTH = 256  # tokens of a built-in prompt, in training and held out
ANSWER_TOKENS = 64  # of an answer of the model's own
HOLD = 0.25  # share of the steps at full depth
RANK = 16  # of an adapter
STEPS = 160
BATCH_SIZE = 1
ACCUMULATE = 4
HELD_OUT_DECODE_TOKENS = 32
SWEEP_EVERY = 40
CHECKPOINT_EVERY = 20

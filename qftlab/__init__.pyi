"""The public names, one line a room's file: what type checkers read, and what `qftlab.__getattr__` loads from."""

from .decoding.beam import beam_search as beam_search
from .decoding.engine import generate as generate, stream as stream
from .evaluate.answers import pass_at_k as pass_at_k, wilson_interval as wilson_interval
from .files import bundled as bundled
from .maths.logprobs import token_logprobs as token_logprobs
from .maths.losses import (
    clipped_policy_loss as clipped_policy_loss,
    dpo_loss as dpo_loss,
    kl_estimate as kl_estimate,
    leave_one_out_advantages as leave_one_out_advantages,
    masked_cross_entropy as masked_cross_entropy,
    preference_accuracy as preference_accuracy,
)
from .maths.sampling import filter_logits as filter_logits, uniform as uniform
from .maths.verify import (
    countdown_reward as countdown_reward,
    extract_answer as extract_answer,
    parse_expression as parse_expression,
    reasoned_reward as reasoned_reward,
)
from .model.export import export_model as export_model
from .model.loading import extend_model as extend_model, load_model as load_model, save_model as save_model
from .model.lora import (
    add_adapters as add_adapters,
    count_parameters as count_parameters,
    load_adapters as load_adapters,
    merge_adapters as merge_adapters,
    save_adapters as save_adapters,
)
from .rows.batches import (
    Example as Example,
    batches as batches,
    count_trained as count_trained,
    first_fit_decreasing as first_fit_decreasing,
    pack as pack,
    pad as pad,
)
from .rows.chat import render_chat as render_chat, render_prompt as render_prompt
from .rows.countdown import fresh_problems as fresh_problems
from .rows.examples import encode_pairs as encode_pairs, encode_rows as encode_rows
from .rows.schemas import row_to_messages as row_to_messages
from .rows.sources import load as load, load_rows as load_rows
from .rows.tokenizer import extend_tokenizer as extend_tokenizer, load_tokenizer as load_tokenizer
from .settings import (
    DPOConfig as DPOConfig,
    LoRAConfig as LoRAConfig,
    PolicyConfig as PolicyConfig,
    PreferenceLoss as PreferenceLoss,
    RLOOConfig as RLOOConfig,
    RewardConfig as RewardConfig,
    SFTConfig as SFTConfig,
    SamplingParams as SamplingParams,
    TrainConfig as TrainConfig,
)
from .train.dpo import Reference as Reference, dpo as dpo, fit_pairs as fit_pairs
from .train.reward import (
    ImplicitReward as ImplicitReward,
    ModelReward as ModelReward,
    fit_reward as fit_reward,
    reward as reward,
    reward_model as reward_model,
)
from .train.rloo import (
    PolicyStep as PolicyStep,
    fit_policy as fit_policy,
    rloo as rloo,
)
from .train.sft import fit_examples as fit_examples, fit_rows as fit_rows, held_out_loss as held_out_loss, sft as sft
from .train.step import Step as Step, count_trained_tokens as count_trained_tokens, to_device as to_device
from .evaluate.split import contamination as contamination
from .train.rollouts import encode_prompts as encode_prompts

__version__: str
__all__: list[str]

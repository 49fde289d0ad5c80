"""
Define ChatGLM-6B's network in transformers' style, written from its description (FORMATS section 3).

Shapes: b batch, s tokens of this call, n_h heads, d features of a head, h = n_h * d. The modules have the published
names, so published weights load as they are.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.glm.modeling_glm import eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from glm_peft.models.chatglm.configuration_chatglm import ChatGLMConfig
from glm_peft.models.chatglm.positions import build_position_rows

# The published code takes 28 layers here, whatever num_layers says.
_RESIDUAL_SCALE = math.sqrt(2 * 28)


class ChatGLMRotaryEmbedding(nn.Module):
    """Rotary embedding that gives each of the two position rows one half of the head."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.config = config
        # After loading on the meta device, transformers rebuilds the buffers of a class with RotaryEmbedding in its
        # name, by these attributes.
        self.rope_type = "default"
        inv_freq, self.attention_scaling = self.compute_default_rope_parameters(config)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(
        config: ChatGLMConfig, device: torch.device | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, float]:
        """Return the frequencies [d / 4] and a scale of 1."""
        half = config.head_dim // 2
        inv_freq = 1.0 / config.rope_theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
        # The weights were trained with frequencies in float16. Rounded anywhere else, a rebuilt buffer would not be.
        return inv_freq.half().float().to(device), 1.0

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn position_rows [b, 2, s] into cosines and sines [b, 1, s, 2, d / 2]."""
        angles = position_rows.transpose(1, 2)[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate states [b, n_h, s, d], each half of the head by its own position row."""
    # Feature j is paired with j + d / 4: the half is cut in two, where GLM-4 interleaves.
    halves = states.unflatten(-1, (2, -1))
    first, second = halves.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (halves * cos + turned * sin).flatten(-2)


class ChatGLMAttention(nn.Module):
    """Multi-head attention that projects query, key and value in one linear layer."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1  # eager attention repeats keys and values by it
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False  # sdpa takes a missing mask for a causal one otherwise; the prompt is bidirectional
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Turn hidden_states [b, s, h] into [b, s, h], and return the weights where the implementation has them."""
        input_shape = hidden_states.shape[:-1]
        # Query, key and value stand side by side within each head, so the cut is along 3 * d, not along 3 * h.
        fused = self.query_key_value(hidden_states).view(*input_shape, -1, 3 * self.head_dim)
        query, key, value = fused.transpose(1, 2).chunk(3, dim=-1)
        query, key = _rotate(query, *position_embeddings), _rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.dense(output.reshape(*input_shape, -1).contiguous()), weights


class ChatGLMMLP(nn.Module):
    """Feed-forward network that goes from h to 4h and back."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Turn [b, s, h] into [b, s, h]."""
        return self.dense_4h_to_h(self.activation_fn(self.dense_h_to_4h(hidden_states)))


class ChatGLMLayer(GradientCheckpointingLayer):
    """Layer whose residuals start from the normalised input, scaled."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ChatGLMMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Turn [b, s, h] into [b, s, h]."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = normed * _RESIDUAL_SCALE + self.attention(normed, **kwargs)[0]
        normed = self.post_attention_layernorm(hidden_states)
        return normed * _RESIDUAL_SCALE + self.mlp(normed)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Base class that tells transformers how ChatGLM-6B is loaded, split over devices and attended."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]  # published checkpoints store it, the model has it
    # Flash attention knows no mask in which only the prompt is bidirectional.
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ChatGLMLayer, "attentions": ChatGLMAttention}


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Decoder that turns token ids into hidden states."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMLayer(config, index) for index in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = ChatGLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.word_embeddings = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        position_rows: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """
        Compute the hidden states [b, s, h] after the last norm.

        Args:
            input_ids: [b, s]. Complete sequences, unless `position_rows` says where they are.
            attention_mask: [b, past + s], 1 for real tokens.
            position_ids: ignored. ChatGLM-6B has two rows, and PEFT shifts what comes under this name.
            position_rows: [b, 2, s], see `build_position_rows`; computed from `input_ids` where absent.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        if position_rows is None:
            if input_ids is None:
                raise ValueError("Expected position_rows beside inputs_embeds: positions depend on the ids.")
            position_rows = build_position_rows(input_ids, attention_mask, self.config)
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        kwargs["attention_mask"] = self._build_mask(hidden_states, attention_mask, past_key_values, position_rows)
        kwargs["position_embeddings"] = self.rotary_emb(hidden_states, position_rows)
        for layer in self.layers:
            hidden_states = layer(hidden_states, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        # PEFT passes a prefix as a cache even with use_cache=False: returned, `generate` would go on with it.
        return BaseModelOutputWithPast(self.final_layernorm(hidden_states), past_key_values if use_cache else None)

    def _build_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        position_rows: torch.Tensor,
    ) -> torch.Tensor | None:
        """Build a causal mask, but let every token see all of its example's prompt (up to `<sop>`)."""
        past, length = 0, inputs_embeds.shape[1]
        total = length
        if past_key_values is not None:
            past = int(past_key_values.get_seq_length())
            # A static cache has columns for tokens to come, which the mask must have too.
            total = past_key_values.get_mask_sizes(length, 0)[0]
        # The second position is 0 in the prompt only. Cached tokens come before all others: causal shows them anyway.
        is_prompt = nn.functional.pad(position_rows[:, 1] == 0, (past, max(total - past - length, 0)))

        # Only the first token of an example has both positions 0; several of them make a packed row.
        example = (position_rows == 0).all(dim=1).cumsum(dim=1)
        is_packed = attention_mask is None and past_key_values is None and bool((example[:, -1] > 1).any())

        def sees_prompt(batch: int, head: int, query: int, key: int) -> torch.Tensor:
            return is_prompt[batch, key]

        def in_one_example(batch: int, head: int, query: int, key: int) -> torch.Tensor:
            return example[batch, query] == example[batch, key]

        return create_causal_mask(
            self.config,
            inputs_embeds,
            attention_mask,
            past_key_values,
            or_mask_function=sees_prompt,
            and_mask_function=in_one_example if is_packed else None,
        )


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM-6B with the language modelling head, whose weight is tied to the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLMConfig):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        position_rows: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """
        Compute the logits, and the loss where there are labels.

        Args:
            (others): those of `ChatGLMModel.forward`.
            labels: [b, s], -100 where there is no loss.
            logits_to_keep: how many of the last positions get logits (0 for all), or their indices.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            position_rows=position_rows,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare a step's inputs as transformers does, with the position rows of the tokens that it computes."""
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        # Made from the complete sequence: a cached step passes on the last token only, which does not tell its rows.
        # Under a name of their own PEFT leaves them alone; it would add the prefix length to `position_ids`.
        rows = build_position_rows(input_ids, attention_mask, self.config)
        inputs["position_rows"] = rows[:, :, -inputs["input_ids"].shape[1] :]
        # With a static cache transformers has made it a plain causal 4-D mask: the prompt would not be bidirectional.
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        return inputs

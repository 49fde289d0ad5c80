"""
Map the published parameter names of ChatGLM2, ChatGLM3 and GLM-4 to those of `GlmForCausalLM` (FORMATS section 2).

transformers applies the mapping while it reads the shards, so quantization, sharding and low memory use come with it.
"""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming

_NOTHING = r"^(?!)"  # matches no name


class _ReadOnlyRenaming(WeightRenaming):
    """Rename on loading only."""

    # Undone on saving, a mapping leaves a "glm" folder that stock transformers loads with random weights.

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming(_NOTHING, _NOTHING)


class _ReadOnlyConverter(WeightConverter):
    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming(_NOTHING, _NOTHING)


def register_key_mapping() -> None:
    """Let every `glm` model read the published names beside its own."""
    register_checkpoint_conversion_mapping(
        "glm",
        [
            _ReadOnlyRenaming(r"^transformer\.embedding\.word_embeddings", "model.embed_tokens"),
            _ReadOnlyRenaming(r"^transformer\.encoder\.layers", "model.layers"),
            _ReadOnlyRenaming(r"^transformer\.encoder\.final_layernorm", "model.norm"),
            _ReadOnlyRenaming(r"^transformer\.output_layer", "lm_head"),
            # A buffer that the model computes: under its own name it is left out without a report.
            _ReadOnlyRenaming(r"^transformer\.rotary_pos_emb\.inv_freq", "model.rotary_emb.inv_freq"),
            _ReadOnlyRenaming(r"self_attention\.dense", "self_attn.o_proj"),
            _ReadOnlyRenaming(r"mlp\.dense_h_to_4h", "mlp.gate_up_proj"),
            _ReadOnlyRenaming(r"mlp\.dense_4h_to_h", "mlp.down_proj"),
            # No suffix: weight and bias. Split sizes the pieces by their targets; keys are fewer than queries.
            _ReadOnlyConverter(
                "self_attention.query_key_value",
                ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                operations=[Split(dim=0)],
            ),
        ],
        overwrite=True,
    )

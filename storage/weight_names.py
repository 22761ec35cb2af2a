"""Names in public checkpoints, as regular expressions -> names here (paper Sec. 4.1).

"#0" marks the first part of a tensor that is fused here. Tensors mapped to "" are dropped: nothing
here reads them (backbone.py). `pretrained.py` refuses every other name.
"""

TIMM = {
    r"cls_token": "prefix#0",
    r"reg_token": "prefix#1",
    r"pos_embed": "pos_embed",
    r"patch_embed\.proj\.(\w+)": r"patch_embed.\1",
    r"blocks\.(\d+)\.(norm[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"blocks\.(\d+)\.attn\.(qkv|proj)\.(\w+)": r"blocks.\1.\2.\3",
    r"blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"blocks\.(\d+)\.ls([12])\.(gamma|scale_factor)": r"blocks.\1.scale\2",
    r"norm\.\w+|attn_pool\..*": "",
}
DINO_HF = {
    r"embeddings\.cls_token": "prefix#0",
    r"embeddings\.register_tokens": "prefix#1",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection\.(\w+)": r"patch_embed.\1",
    r"encoder\.layer\.(\d+)\.(norm[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(\w+)": r"blocks.\1.qkv.\2#0",
    r"encoder\.layer\.(\d+)\.attention\.attention\.key\.(\w+)": r"blocks.\1.qkv.\2#1",
    r"encoder\.layer\.(\d+)\.attention\.attention\.value\.(\w+)": r"blocks.\1.qkv.\2#2",
    r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)": r"blocks.\1.proj.\2",
    r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.scale\2",
    r"encoder\.layer\.(\d+)\.mlp\.(fc[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"embeddings\.mask_token|layernorm\.\w+": "",
}
SIGLIP_HF = {
    r"vision_model\.embeddings\.patch_embedding\.(\w+)": r"patch_embed.\1",
    r"vision_model\.embeddings\.position_embedding\.weight": "pos_embed",
    r"vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)": r"blocks.\1.qkv.\2#0",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.k_proj\.(\w+)": r"blocks.\1.qkv.\2#1",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.v_proj\.(\w+)": r"blocks.\1.qkv.\2#2",
    r"vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)": r"blocks.\1.proj.\2",
    r"vision_model\.encoder\.layers\.(\d+)\.mlp\.(fc[12])\.(\w+)": r"blocks.\1.\2.\3",
    r"text_model\..*|logit_(scale|bias)|vision_model\.(post_layernorm|head)\..*": "",
}
LLM_HF = {
    r"model\.embed_tokens\.weight": "embed.weight",
    r"model\.norm\.weight": "norm.weight",
    r"model\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)": r"layers.\1.qkv.\2#0",
    r"model\.layers\.(\d+)\.self_attn\.k_proj\.(\w+)": r"layers.\1.qkv.\2#1",
    r"model\.layers\.(\d+)\.self_attn\.v_proj\.(\w+)": r"layers.\1.qkv.\2#2",
    r"model\.layers\.(\d+)\.self_attn\.o_proj\.(\w+)": r"layers.\1.o.\2",
    r"model\.layers\.(\d+)\.mlp\.gate_proj\.weight": r"layers.\1.gate_up.weight#0",
    r"model\.layers\.(\d+)\.mlp\.up_proj\.weight": r"layers.\1.gate_up.weight#1",
    r"model\.layers\.(\d+)\.mlp\.down_proj\.weight": r"layers.\1.down.weight",
    r"model\.layers\.(\d+)\.input_layernorm\.weight": r"layers.\1.input_norm.weight",
    r"model\.layers\.(\d+)\.post_attention_layernorm\.weight": r"layers.\1.mlp_norm.weight",
    r"lm_head\.weight": "",  # tied: equal to the embedding, stored twice
}
LLM_HF_UNTIED = LLM_HF | {r"lm_head\.weight": "head.weight"}  # Llama 2
# A whole VLM's names -> part/name. The LLM's names are then transformers', the encoders' timm's.
PRISMATIC = {
    r"projector/projector\.(.*)": r"projector/\1",
    r"llm_backbone/llm\.(.*)": r"llm/\1",
    r"vision_backbone/(dino|siglip)_featurizer\.(.*)": r"\1/\2",
}
OPENVLA = {
    r"projector\.fc1\.(\w+)": r"projector/0.\1",
    r"projector\.fc2\.(\w+)": r"projector/2.\1",
    r"projector\.fc3\.(\w+)": r"projector/4.\1",
    r"language_model\.(.*)": r"llm/\1",
    r"vision_backbone\.featurizer\.(.*)": r"dino/\1",
    r"vision_backbone\.fused_featurizer\.(.*)": r"siglip/\1",
}

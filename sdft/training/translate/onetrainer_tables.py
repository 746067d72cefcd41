"""Options of OneTrainer that need no thought: those with the same meaning here, and those with none."""

from __future__ import annotations

from typing import Any

from sdft.training.translate.onetrainer_optimizers import FLAG_REASONS
from sdft.training.translate.rules import Same

SAME = {
    "base_model_name": Same("model.weights"),
    "batch_size": Same("data.batch_size", 1),
    "gradient_accumulation_steps": Same("trainer.accumulate_grad_batches", 1),
}
FORMER = {
    "train_unet": "unet.train",
    "unet_learning_rate": "unet.learning_rate",
    "unet_weight_dtype": "unet.weight_dtype",
    "train_text_encoder": "text_encoder.train",
    "text_encoder_learning_rate": "text_encoder.learning_rate",
    "text_encoder_weight_dtype": "text_encoder.weight_dtype",
    "train_text_encoder_2": "text_encoder_2.train",
    "text_encoder_2_learning_rate": "text_encoder_2.learning_rate",
    "vae_model_name": "vae.model_name",
    "text_encoder_2_weight_dtype": "text_encoder_2.weight_dtype",
    "vae_weight_dtype": "vae.weight_dtype",
    "lora_layers": "layer_filter",
    "lora_layer_preset": "layer_filter_preset",
    "lora_layers_regex": "layer_filter_regex",
    "save_after": "save_every",
    "save_after_unit": "save_every_unit",
    "dataloader_threads": "caching_threads",
    "optimizer_weight_decay": "optimizer.weight_decay",
    "weight_decay": "optimizer.weight_decay",
}
"""Names of earlier versions -> those of today."""
WHOLE = tuple(
    [
        "optimizer_defaults",
        "cloud",
        "secrets",
        "prior",
        "transformer",
        "unconditional_transformer",
        "text_encoder_3",
        "text_encoder_4",
        "effnet_encoder",
        "decoder",
        "decoder_text_encoder",
        "decoder_vqgan",
        "quantization",
    ]
)
"""Objects that are taken as one option."""
PARTS_OF_OTHERS = dict.fromkeys(
    (
        *WHOLE,
        "text_encoder_3_layer_skip",
        "text_encoder_4_layer_skip",
        "text_encoder_sequence_length",
        "text_encoder_2_sequence_length",
        "frames",
        "dynamic_timestep_shifting",
        "extra_model_name",
        "vb_loss_strength",
        "latent_caching_epochs",
        "custom_conditioning_image",
        "sample_video_format",
        "sample_audio_format",
        "cep_gamma",
    ),
    "",
)
"""Options of other models, and those that only describe the program."""
PRECISION = "model.dtype, model.quantization and trainer.precision set precision here"
OFFLOAD = "model.offload_blocks=N and model.offload_idle=true keep weights on the CPU here"
SAVED = "callbacks.lora_files.every=N writes a LoRA every N steps, callbacks=progress keeps checkpoints"
NO_EFFECT = tuple(
    [
        "__version",
        "debug_mode",
        "debug_dir",
        "tensorboard_expose",
        "tensorboard_always_on",
        "tensorboard_port",
        "prevent_overwrites",
        "include_train_config",
        "clear_cache_before_training",
        "caching_threads",
        "prefetch_next_batch",
        "train_device",
        "temp_device",
        "fallback_train_dtype",
        "enable_autocast_cache",
        "async_offloading",
        "backup_before_save",
        "sample_image_format",
        "samples_to_tensorboard",
        "lora_weight_dtype",
        "embedding_weight_dtype",
        "vae.weight_dtype",
        "bundle_additional_embeddings",
        "gradient_reduce_precision",
        "fused_gradient_reduce",
        "async_gradient_reduce",
        "async_gradient_reduce_buffer",
        "device_indexes",
        "validate_after",
        "validate_after_unit",
        "save_filename_prefix",
        "save_every_unit",
        "custom_learning_rate_scheduler",
        "scheduler_params",
        "lokr_vec_trick",
        "lokr_dora_on_output",
        "circular_mask_generation",
        "random_rotate_and_crop",
        "weight_dtype",
        "train_unet_epochs",
        "train_text_encoder_epochs",
        "train_text_encoder_2_epochs",
        "embeddings",
        "token_count",
        "initial_embedding_text",
        "layer_offload_fraction",
        "enable_activation_offloading",
        "enable_async_offloading",
        "lora_decompose_norm_epsilon",
        "oft_clipped_norm",
        "optimizer.stochastic_rounding",
        "optimizer.foreach",
        "optimizer.fused",
        "optimizer.use_triton",
        "sample_skip_first",
    ]
)
"""Options that change nothing in the weights, and settings of options above; they are listed in one line."""
WITHOUT = {
    **FLAG_REASONS,
    **dict.fromkeys(NO_EFFECT, ""),
    **{
        f"{part}.{key}": ""
        for part in ("unet", "text_encoder", "text_encoder_2", "vae")
        for key in (
            "model_name",
            "include",
            "train",
            "stop_training_after",
            "stop_training_after_unit",
            "learning_rate",
            "attention_mask",
            "guidance_scale",
            "gradient_checkpointing",
            "train_embedding",
            "dropout_probability",
            "quantization",
            "__version",
        )
    },
    **{
        f"{part}.{key}": OFFLOAD
        for part in ("unet", "text_encoder", "text_encoder_2", "vae")
        for key in ("offload_fraction", "activation_offloading")
    },
    "embedding.__version": "",
    "optimizer.__version": "",
    "validation": "images are held out by default here: data.held_out",
    "multi_gpu": "trainer.devices=N trains on N GPUs",
    "force_circular_padding": "no tiling textures here",
    "only_cache": "python -m sdft.data cache fills the cache",
    "timestep_shift": "objective/timesteps=logit_normal with a mean above 0 moves them to high noise",
    "loss_scaler": "scale the learning rate instead",
    "text_encoder_layer_skip": "SDXL was trained with the layer before the last",
    "text_encoder_2_layer_skip": "SDXL was trained with the layer before the last",
    "preserve_embedding_norm": "new words are not normalised here; tuning.lr_scale.words slows them down",
    "lora_decompose_output_axis": "DoRA normalises as in the paper here",
    "non_ema_sampling": "previews show the average here",
    "oft_block_share": "rotations are not shared here",
    "dora_oft": "tuning.method=oft has no magnitudes here",
    "oft_scaled": "tuning.method=oft has no scale here",
    "oft_cans": "tuning.method=oft is exactly orthogonal here",
    "lokr_decompose_both": "LoKr decomposes the larger factor here",
    "lokr_use_tucker": "no Tucker decomposition here",
    "lokr_decompose_factor": "LoKr chooses its factors by the rank here",
    "lokr_full_matrix": "a high rank leaves the factor whole",
    "lokr_weight_decompose": "DoRA is a method of its own here: tuning.method=dora",
    "save_every": SAVED,
    "save_skip_first": SAVED,
    "extra_precision": PRECISION,
}
"""Key -> why it has no counterpart, or what does instead; empty for those without an effect on the run."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "timestep_shift": (1, 1.0),
    "lokr_decompose_factor": (-1,),
    "non_ema_sampling": (True,),
}
SCHEDULES = {
    "CONSTANT": "constant",
    "LINEAR": "linear",
    "COSINE": "cosine",
    "REX": "rex",
    "COSINE_WITH_RESTARTS": "cosine_restarts",
    "COSINE_WITH_HARD_RESTARTS": "cosine_restarts",
}
DTYPES = {
    "FLOAT_32": ("dtype", "fp32"),
    "TFLOAT_32": ("dtype", "fp32"),
    "BFLOAT_16": ("dtype", "bf16"),
    "FLOAT_16": ("dtype", "fp16"),
    "FLOAT_8": ("quantization", "fp8"),
    "INT_8": ("quantization", "int8"),
    "NFLOAT_4": ("quantization", "nf4"),
    "NONE": ("dtype", "bf16"),
}
"""weight_dtype -> the option of `model` and its value."""

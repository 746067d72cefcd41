"""Options of kohya's sd-scripts that need no thought: those with the same meaning here, and those with none."""

from __future__ import annotations

from typing import Any

from sdft.training.translate.rules import Same

SAME = {
    "pretrained_model_name_or_path": Same("model.weights"),
    "vae": Same("model.vae"),
    "gradient_checkpointing": Same("model.gradient_checkpointing", False),
    "train_batch_size": Same("data.batch_size", 1),
    "gradient_accumulation_steps": Same("trainer.accumulate_grad_batches", 1),
    "max_grad_norm": Same("trainer.gradient_clip_val", 1.0),
    "max_data_loader_n_workers": Same("data.num_workers"),
    "seed": Same("seed"),
    "sample_every_n_steps": Same("callbacks.previews.every"),
}
FROM_HUB = "python -m sdft.publish run=RUN_FOLDER to=USER/NAME uploads a finished run"
IN_METADATA = "LoRA files hold the settings of their run; receipt.json has all of them"
MEMORY = "hardware=auto and the options in docs/performance.md save memory here"
BY_STEPS = "callbacks.lora_files.every=N counts steps; callbacks=progress keeps checkpoints, also of whole models"
CAPTIONS = "change the captions: python -m sdft.data edit"
WITHOUT = {
    **dict.fromkeys(
        (
            "huggingface_repo_id",
            "huggingface_repo_type",
            "huggingface_path_in_repo",
            "huggingface_token",
            "async_upload",
            "huggingface_repo_visibility",
            "save_state_to_huggingface",
            "resume_from_huggingface",
        ),
        FROM_HUB,
    ),
    **dict.fromkeys(
        (
            "metadata_title",
            "metadata_author",
            "metadata_description",
            "metadata_license",
            "metadata_tags",
            "training_comment",
            "no_metadata",
        ),
        IN_METADATA,
    ),
    **dict.fromkeys(
        ("lowram", "highvram", "blocks_to_swap", "cpu_offload_checkpointing", "fused_optimizer_groups"), MEMORY
    ),
    **dict.fromkeys(
        (
            "deepspeed",
            "zero_stage",
            "offload_optimizer_device",
            "offload_optimizer_nvme_path",
            "offload_param_device",
            "offload_param_nvme_path",
            "zero3_init_flag",
            "zero3_save_16bit_model",
            "fp16_master_weights_and_gradients",
        ),
        "strategy=fsdp shards weights and states",
    ),
    **dict.fromkeys(("ddp_timeout", "ddp_gradient_as_bucket_view", "ddp_static_graph"), "strategy=ddp sets it itself"),
    **dict.fromkeys(
        ("enable_wildcard", "secondary_separator", "keep_tokens_separator", "token_warmup_min", "token_warmup_step"),
        CAPTIONS,
    ),
    "caption_dropout_every_n_epochs": "data.caption_dropout is a probability at each visit",
    "weighted_captions": "SDXL has none there either",
    "clip_skip": "no effect on SDXL there; the layer before the last is read here too",
    "full_fp16": "weights train in fp32 or bf16 here: ++model.dtype.unet=bf16",
    "torch_compile": "model.compile=blocks or full",
    "dynamo_backend": "model.compile=blocks or full",
    "mem_eff_attn": "model.attention=sdpa needs as little memory",
    "diffusers_xformers": "model.attention=xformers",
    "block_lr": "rates are by part here: tuning.lr_scale",
    "v_pred_like_loss": "objective/weighting=curve draws it",
    "ip_noise_gamma_random_strength": "objective.input_perturbation falls in a line to 0 over the run",
    "huber_scale": "scale the learning rate instead",
    "lr_scheduler_args": "lr_schedule.* are its numbers here",
    "lr_scheduler_timescale": "no schedule here falls with a square root of the step",
    "face_crop_aug_range": "crop the images before training; data.augmentation.zoom zooms at random",
    "in_json": "captions are in files beside the images, or in metadata.jsonl in their folder",
    "dataset_repeats": "multiply epochs by it",
    "dataset_class": "docs/extending.md has an example of a data source",
    "debug_dataset": "python -m sdft.data check shows the images",
    "network_multiplier": "tuning.alpha scales the output",
    "resume": "resume= takes a run folder or checkpoint of sdft; tuning.start=FILE continues a LoRA",
    "initial_epoch": "resume=auto continues a run",
    "initial_step": "resume=auto continues a run",
    "skip_until_initial_step": "resume=auto continues a run",
    "save_every_n_epochs": BY_STEPS,
    "save_n_epoch_ratio": BY_STEPS,
    "save_last_n_epochs": "callbacks.lora_files.keep=N keeps the last N files",
    "save_last_n_epochs_state": "callbacks.last.keep=N keeps the last N checkpoints",
    "save_last_n_steps_state": "callbacks.last.keep=N keeps the last N checkpoints",
    "sample_every_n_epochs": "callbacks.previews.every=N counts steps",
    "wandb_run_name": "name= is the name of the run, in W&B too",
    "wandb_api_key": "wandb login keeps it",
    "log_tracker_config": "logger.wandb.* are its settings here",
    "log_prefix": "logs are in the folder of the run",
    "validation_split": "data.held_out is the share, 0.1 by default",
    "validation_seed": "by the names of the images here",
    "validate_every_n_steps": "trainer.validate_every=N",
    "validate_every_n_epochs": "trainer.validate_every=N counts steps",
    "max_validation_steps": "data.held_out sets how many images are held out",
    "use_object_template": "captions are those of the images; caption= is a template",
    "use_style_template": "captions are those of the images; caption= is a template",
    "weights": "an embedding to go on from: resume= continues a run of sdft",
    "output_config": "--cfg job prints the config",
}
"""Key -> why it has no counterpart, or what does instead. Those without an effect on the run have an empty text in
`NO_EFFECT`."""
NO_EFFECT = tuple(
    [
        "sdpa",
        "no_half_vae",
        "vae_batch_size",
        "persistent_data_loader_workers",
        "tokenizer_cache_dir",
        "cache_info",
        "save_state",
        "save_state_on_train_end",
        "log_config",
        "disable_mmap_load_safetensors",
        "use_safetensors",
        "skip_cache_check",
        "console_log_level",
        "console_log_file",
        "console_log_simple",
        "sample_at_first",
        "log_with_config",
        "resize_interpolation",
    ]
)
"""Options that change nothing in the weights; they are listed in one line."""
WITHOUT |= dict.fromkeys(NO_EFFECT, "")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "token_warmup_min": (1,),
    "dynamo_backend": ("inductor",),
    "dataset_repeats": (1, "1"),
    "network_multiplier": (1, 1.0),
    "vae_batch_size": (1,),
    "huber_scale": (1, 1.0),
}

SCHEDULES: dict[str, tuple[str, dict[str, tuple[str, Any]]]] = {
    "constant": ("constant", {}),
    "constant_with_warmup": ("constant", {}),
    "linear": ("linear", {"": ("final", 0.0)}),
    "cosine": ("cosine", {"": ("final", 0.0)}),
    "cosine_with_min_lr": ("cosine", {"lr_scheduler_min_lr_ratio": ("final", 0.0)}),
    "cosine_with_restarts": ("cosine_restarts", {"lr_scheduler_num_cycles": ("cycles", 1), "": ("final", 0.0)}),
    "polynomial": ("polynomial", {"lr_scheduler_power": ("power", 1.0), "": ("final", 0.0)}),
    "warmup_stable_decay": (
        "warmup_stable_decay",
        {"lr_decay_steps": ("decay", 0.2), "lr_scheduler_min_lr_ratio": ("final", 0.0)},
    ),
}
"""lr_scheduler -> lr_schedule, and its numbers: kohya's key -> (ours, kohya's default)."""
SAMPLERS = {
    "ddim": "ddim",
    "euler": "euler",
    "k_euler": "euler",
    "euler_a": "euler_a",
    "k_euler_a": "euler_a",
    "heun": "heun",
    "dpmsolver": "dpmpp_2m",
    "dpmsolver++": "dpmpp_2m",
    "dpmsingle": "dpmpp_2m",
}
LAUNCHER = {
    "commands": ("accelerate", "launch", "python", "python3", "&&", "call"),
    "without": (
        "num_cpu_threads_per_process",
        "mixed_precision",
        "dynamo_backend",
        "main_process_port",
        "quiet",
        "num_machines",
        "machine_rank",
        "gpu_ids",
        "config_file",
        "multi_gpu",
    ),
}
"""Words before the script: those of the command, and options of accelerate without an effect here."""

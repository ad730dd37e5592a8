"""How much a model says of the answers to forget and of the held-out answers to keep: greedy decoding, ROUGE-L recall.

    torchrun --nproc_per_node=1 --master_port=18765 tofu_evaluation.py split=forget05 model_family=phi model_path=CKPT

Every key stands in config/eval_tofu.yaml and config/common.yaml.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from omegaconf import DictConfig

import settings
import utils


def prepare(cfg: DictConfig) -> utils.Family:
    """Fill in what the family decides, and refuse what cannot work before anything is loaded."""
    family = settings.prepare(cfg, "eval_tofu")
    settings.check_forget_data(cfg)
    if not cfg.model_path:
        raise ValueError("model_path is missing: the folder (or hub name) of the model to evaluate")
    cfg.model_path = utils.find_path(cfg.model_path)
    settings.check_checkpoint("model_path", cfg.model_path)
    if cfg.save_dir is None:
        cfg.save_dir = f"{cfg.model_path}/eval_results/ds_size{cfg.ds_size}"
    return family


def run(cfg: DictConfig) -> dict[str, float]:
    family = prepare(cfg)

    import dataloader
    from unlearn.checkpoints import load_model, load_tokenizer, pad_id
    from unlearn.scores import greedy_answers, rouge_l_recalls, token_mean, token_nlls

    tokenizer = load_tokenizer(cfg.model_path, family.hf_key)
    bf16 = utils.use_bfloat16(cfg.dtype, family)
    model = load_model(cfg.model_path, utils.device(), family.flash_attention2 and bf16)
    collate = partial(dataloader.collate, pad=pad_id(tokenizer))

    data = dataloader.unlearning_data(cfg)
    scores: dict[str, float] = {}
    rows = []
    for name, texts in (("forget", data.forget[: cfg.ds_size]), ("retain", data.held_out[: cfg.ds_size])):
        tokenized = dataloader.tokenize(texts, tokenizer, family, cfg.max_length)
        answers = greedy_answers(model, tokenized, tokenizer, bf16, cfg.generation.max_length)
        recalls = rouge_l_recalls(answers, [row["answer"] for row in texts])
        scores[f"{name}_rougeL_recall"] = sum(recalls) / len(recalls)
        scores[f"{name}_loss"] = token_mean(token_nlls(model, tokenized, collate, bf16))
        rows += [
            {"data": name, "row": i, "rougeL_recall": recall, "generated_text": answer}
            for i, (recall, answer) in enumerate(zip(recalls, answers, strict=True))
        ]
        utils.say(
            f"{name:7} ROUGE-L recall {scores[f'{name}_rougeL_recall']:.3f}   loss {scores[f'{name}_loss']:.3f} nats a token"
        )

    if utils.is_main_process():
        utils.write_csv(Path(cfg.save_dir, "rouge_rows.csv"), rows)
        utils.write_json(
            Path(cfg.save_dir, "scores.json"), scores | {"settings": utils.flatten(cfg), "versions": utils.versions()}
        )
    utils.say(f"{cfg.model_path}: scores are in {cfg.save_dir}")
    return scores


if __name__ == "__main__":
    settings.cli(run, "eval_tofu")

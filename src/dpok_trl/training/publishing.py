"""What a trained policy is published as: the adapter in a folder or on the Hub, with a model card."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from dpok_trl.policy.saved import MODEL_FOLDER
from dpok_trl.policy.tuning import Tuned
from dpok_trl.results.hub import HubError, open_repository, push_folder
from dpok_trl.results.model_card import write_model_card
from dpok_trl.rewards.combining import RewardSet
from dpok_trl.training.config import DPOKConfig
from dpok_trl.training.processes import together
from dpok_trl.training.run_facts import run_facts


logger = logging.getLogger(__name__)


class PublishingMixin:
    """Saving and pushing, for [`DPOKTrainer`]: it reads what a trainer holds and changes nothing."""

    _tag_names: list[str]
    config: DPOKConfig
    accelerator: Accelerator
    output_dir: Path
    pipeline: DiffusionPipeline
    tuned: Tuned
    rewards: RewardSet
    first_epoch: int
    global_step: int
    last_metrics: dict[str, float]

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Writes the adapter (`pytorch_lora_weights.safetensors` with its metadata, for `pipe.load_lora_weights`), a model card and the config. After full
        fine-tuning, the whole pipeline instead of an adapter.

        Args:
            output_dir (`str` or `Path`, *optional*): Default: `output_dir` of the run.
        """
        folder = self.output_dir if output_dir is None else Path(output_dir)
        if self.accelerator.is_main_process:
            self._write_model(folder)
        self.accelerator.wait_for_everyone()

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False
    ) -> None:
        """DDPO's name of [`~DPOKTrainer.save_model`]; with `push_to_hub`, [`~DPOKTrainer.push_to_hub`] follows."""
        self.save_model(save_directory)
        if push_to_hub:
            self.push_to_hub(repo_id or self.config.hub_model_id or Path(save_directory).name)

    def push_to_hub(
        self,
        repo_id: str | None = None,
        *,
        commit_message: str = "Upload model tuned with DPOK",
        private: bool | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> str | None:
        """Saves the model under `output_dir/model` and uploads it, with the newest checkpoint under `hub_strategy = "checkpoint"`.

        Args:
            repo_id (`str`, *optional*): Default: `config.hub_model_id`.
            private (`bool`, *optional*): For a new repository. Default: `config.hub_private_repo`.
            dataset_name, tags (*optional*): For the model card.

        Returns:
            `str`: The URL of the commit (`None` on other processes than the main one).

        Raises:
            `ValueError`: Without a `repo_id`.
            [`HubError`]: If the repository cannot be used or the upload fails. The model is saved by then; `dpok-trl push output_dir/model REPO` pushes it again.
        """
        repo_id = repo_id or self.config.hub_model_id
        if not repo_id:
            raise ValueError(
                "push_to_hub needs a repository: trainer.push_to_hub('me/rabbit-lora'), or hub_model_id in the config."
            )
        if not self.accelerator.is_main_process:
            return None
        self._write_model(self._model_folder, repo_id, dataset_name, tags, online=True)
        private = self.config.hub_private_repo if private is None else private
        return self._push(repo_id, commit_message, private)

    # ---------------------------------------------------------------- in a run, by `push_to_hub` and `hub_strategy`

    def open_repository(self) -> None:
        """Called on all processes before training: what the Hub will not take is told now, and not after hours.

        Raises:
            [`HubError`]: On the main process, for a bad token, a name that is not allowed and a repository of somebody else; elsewhere `RuntimeError`.
        """
        if not self.config.push_to_hub:
            return
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                try:
                    open_repository(str(self.config.hub_model_id), private=self.config.hub_private_repo)
                except HubError as error:
                    if not error.temporary:
                        raise
                    logger.warning("%s. Training begins all the same; it will be tried again.", error)

    def push_saved(self) -> None:
        """Called on all processes after a checkpoint: pushes the model, if `hub_strategy` says so. A push that fails is a warning; everything is on disk, and
        the next push brings all of it. The others wait at their next exchange."""
        if not self.config.push_to_hub or self.config.hub_strategy == "end" or not self.accelerator.is_main_process:
            return
        self._write_model(self._model_folder, online=True)
        try:
            self._push(str(self.config.hub_model_id), f"Training in progress, step {self.global_step}")
        except HubError as error:
            logger.warning("%s Training goes on.", self._not_pushed(error))

    def push_at_end(self) -> None:
        """Called on all processes when training is done and saved.

        Raises:
            [`HubError`]: On the main process, if the push fails; elsewhere `RuntimeError`.
        """
        if not self.config.push_to_hub:
            return
        with together(self.accelerator):
            if self.accelerator.is_main_process:
                self._write_model(self._model_folder, online=True)
                try:
                    self._push(str(self.config.hub_model_id), "End of training")
                except HubError as error:
                    raise HubError(f"training is done, but {self._not_pushed(error)}", error.temporary) from error

    @property
    def _model_folder(self) -> Path:
        return self.output_dir / MODEL_FOLDER

    def _push(self, repo_id: str, message: str, private: bool | None = None) -> str:
        checkpoint = self.output_dir / f"checkpoint-{self.global_step}"
        with_it = checkpoint if self.config.hub_strategy == "checkpoint" and checkpoint.is_dir() else None
        private = self.config.hub_private_repo if private is None else private
        url = push_folder(self._model_folder, repo_id, commit_message=message, private=private, checkpoint=with_it)
        logger.info("pushed: %s", url)
        return url

    def _not_pushed(self, error: HubError) -> str:
        return (
            f"the model of step {self.global_step} was not pushed: {error} It is saved in {self._model_folder}. To push it: "
            f"dpok-trl push {self._model_folder} {self.config.hub_model_id}"
        )

    # ---------------------------------------------------------------- what is written

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Writes `README.md`, its pictures in `card` and `dpok_config.json` into `output_dir`."""
        if self.accelerator.is_main_process:
            self._write_model_card(self.output_dir, model_name, dataset_name, tags)

    def _write_model(self, folder: Path, *card: Any, online: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tuned.export(self.pipeline, folder)
        self._write_model_card(folder, *card, online=online)

    def _write_model_card(
        self,
        folder: Path,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        online: bool = False,
    ) -> None:
        write_model_card(
            folder,
            run_facts(self),
            model_name=model_name or self.config.hub_model_id or folder.resolve().name,
            dataset_name=dataset_name,
            tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            online=online,
        )

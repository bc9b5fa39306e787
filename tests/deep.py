"""Cases that take long and add little: left out by `make test`, run by `make test-deep`."""

import os
from collections.abc import Collection
from typing import Any

import pytest

DEEP = bool(os.environ.get("ZGRAPH_DEEP"))


def deep(*values: Any, id: str | None = None) -> Any:
    """A case of `pytest.mark.parametrize` that `make test-deep` alone runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.skipif(not DEEP, reason="make test-deep"))


LEFT_OUT = (
    "distributed/test_budget.py::test_a_tight_budget_trains_the_same[3]",
    "distributed/test_copies.py::test_grouped_calls_give_what_packed_buckets_give[3]",
    "distributed/test_deepspeed.py::test_masters_gradients_and_states_are_read_and_written[0]",
    "distributed/test_deepspeed.py::test_parameters_are_whole_for_a_while[0]",
    "distributed/test_departures.py::test_the_others_say_how_a_rank_ended[2-compiles",
    "distributed/test_modes.py::test_evaluation_between_steps[1",
    "distributed/test_modes.py::test_ranks_may_have_other_sizes_in_the_same_step_with_dynamic[0]",
    "distributed/test_modes.py::test_ranks_may_have_other_sizes_in_the_same_step_with_dynamic[1]",
    "distributed/test_parameters.py::test_a_hugging_face_model_built_on_meta[1]",
    "distributed/test_parameters.py::test_uneven_sizes[4",
    "distributed/test_pieces.py::test_training_is_that_of_ddp[1-",
    "distributed/test_pieces.py::test_training_is_that_of_ddp[0-Printing",
    "distributed/test_pieces.py::test_training_is_that_of_ddp[0-Branching",
    "distributed/test_same_program.py::test_models_called_in_another_order[4]",
    "distributed/test_same_program.py::test_ranks_that_drift_apart[evaluate_once_more-3-1-4]",
    "distributed/test_same_program.py::test_ranks_that_drift_apart[skip_a_backward-1-0-4]",
    "distributed/test_same_program.py::test_ranks_that_drift_apart[skip_a_backward-3-0-2]",
    "distributed/test_same_program.py::test_ranks_that_take_heads_of_their_own[take_compiled_heads-4]",
    "distributed/test_same_program.py::test_ranks_that_take_heads_of_their_own[take_new_heads-4]",
    "distributed/test_zoo.py::test_losses_and_gradients_are_those_of_ddp[gpt2",
    "hf/test_ranks.py::test_ranks_may_begin_with_batches_of_other_sizes",
    "hf/test_ranks.py::test_the_moments_of_stage_1_may_lie_on_disk_and_are_resumed",
    "passes/test_bucket.py::test_what_is_computed_again_stays_where_it_is_needed[2000",
    "single/test_adamw.py::test_a_compiled_model_is_trained_the_same[options2]",
    "single/test_benchmark_gpu.py::test_groups_updates_and_whole_steps_are_measured",
    "single/test_depth.py::test_layers_that_are_alike[Turns",
    "single/test_depth.py::test_layers_that_are_alike[build2",
    "single/test_depth.py::test_layers_that_differ_are_all_captured[mixed",
    "single/test_depth.py::test_two_stacks_at_once",
    "single/test_fusion.py::test_a_fused_step_gives_the_same_numbers[neox]",
    "single/test_fusion.py::test_a_fused_step_gives_the_same_numbers[t5]",
    "single/test_fusion.py::test_fifty_steps_stay_together",
    "single/test_fusion.py::test_in_bf16_a_fused_step_is_as_close_to_the_truth[llama]",
    "single/test_fusion.py::test_the_glue_of_a_block_moves_fewer_bytes[llama-4]",
    "single/test_interrupts.py::test_a_hook_of_the_users_own_stays",
    "single/test_interrupts.py::test_all_of_it_where_that_is_asked",
    "single/test_narrator.py::test_a_level_of_the_users_decides",
    "single/test_narrator.py::test_the_users_logging_decides_and_nothing_is_said_twice[after]",
    "single/test_offload.py::test_masters_of_another_dtype_train_the_same[parameters]",
    "single/test_plan.py::test_a_host_without_room_for_all_activations_leaves_them_to_be_computed_again",
    "single/test_plan.py::test_small_parameters_stay_whole_where_the_network_is_the_bound",
    "single/test_profile_machine.py::test_this_machine_can_be_measured_and_planned_for",
    "single/test_recompute.py::test_a_budget_holds_and_the_losses_stay[llama]",
    "single/test_report.py::test_the_predicted_peak_is_the_measured_one[0-weights-rule]",
    "single/test_report.py::test_the_predicted_peak_is_the_measured_one[3-activations-rule]",
    "trust/test_certificate.py::test_what_the_passes_make_is_certified[False-False-1]",
    "trust/test_certificate.py::test_what_the_passes_make_is_certified[True-True-0]",
    "trust/test_kernels.py::test_what_fuse_makes_is_certified[neox",
    "trust/test_kernels.py::test_what_fuse_makes_is_certified[phi3",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[always-auto",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-always-2",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-auto-0",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-auto-1",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-auto-2",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-never",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[always-never-3",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 0]",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 1]",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 2, fused]",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 2, recomputed]",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 3, activations on the host]",
    "trust/test_mutations.py::test_single_faults_are_refused[norms, stage 1]",
)
"""Slow tests with a sibling that `make test` runs: beginnings of names, within this folder."""


def is_left_out(name: str) -> bool:
    """Whether `make test` leaves out a test, by its name within this folder."""
    return not DEEP and name.startswith(LEFT_OUT)


def stale(names: Collection[str]) -> list[str]:
    """The entries of `LEFT_OUT` that name none of these tests, of files that are among them with all their tests."""
    files = {name.partition("::")[0] for name in names}
    here = [entry for entry in LEFT_OUT if entry.partition("::")[0] in files]
    return [entry for entry in here if not any(name.startswith(entry) for name in names)]

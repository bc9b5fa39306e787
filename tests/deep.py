"""Cases that take long and add little: left out by `make test`, run by `make test-deep`."""

import os
from collections.abc import Collection, Sequence
from typing import Any

import pytest

DEEP = bool(os.environ.get("ZGRAPH_DEEP"))


def deep(*values: Any, id: str | None = None) -> Any:
    """A case of `pytest.mark.parametrize` that `make test-deep` alone runs."""
    return pytest.param(*values, id=id, marks=pytest.mark.skipif(not DEEP, reason="make test-deep"))


LEFT_OUT = (
    "browser/test_opening.py::test_what_only_says_more",
    "browser/test_page.py::test_twenty_thousand_nodes",
    "browser/test_phone_and_paper.py::test_two_fingers_zoom_the_timeline",
    "browser/test_pictures.py::test_a_saved_png_is_drawn_from_it[timeline]",
    "browser/test_pictures.py::test_both_are_copied",
    "browser/test_two_runs.py::test_an_address_names",
    "browser/test_two_runs.py::test_nothing_reaches_over_the_side[768]",
    "browser/test_two_runs.py::test_times_and_bytes",
    "distributed/test_accumulation.py::test_four_micro_steps[no_sync-0]",
    "distributed/test_budget.py::test_a_tight_budget_trains_the_same[3]",
    "distributed/test_budget.py::test_the_budget_holds[26700000]",
    "distributed/test_budget.py::test_what_there_is_room_for_is_not_sent_again",
    "distributed/test_copies.py::test_grouped_calls_give_what_packed_buckets_give[3]",
    "distributed/test_deepspeed.py::test_masters_gradients_and_states_are_read_and_written[0]",
    "distributed/test_deepspeed.py::test_parameters_are_whole_for_a_while[0]",
    "distributed/test_departures.py::test_the_others_say_how_a_rank_ended[2-compiles",
    "distributed/test_departures.py::test_the_others_say_how_a_rank_ended[2-raises",
    "distributed/test_engine_checkpoint.py::test_a_step_under_way_goes_on_and_client_state_comes_back_to_its_rank[1",
    "distributed/test_engine_checkpoint.py::test_killed_ranks_go_on_from_a_complete_checkpoint[2]",
    "distributed/test_fusion.py::test_a_rank_that_measures_for_long_is_waited_for",
    "distributed/test_fusion.py::test_the_ranks_share_what_is_to_be_measured_and_choose_alike[True",
    "distributed/test_fusion.py::test_training_with_kernels_is_that_of_ddp[llama-0]",
    "distributed/test_killed_rank.py::test_the_others_say_who_is_gone[2-2-backward",
    "distributed/test_memory.py::test_bytes_at_rest[4-3",
    "distributed/test_memory.py::test_the_predicted_peak_of_stage_0",
    "distributed/test_memory.py::test_the_predicted_peak_of_three_ranks[3]",
    "distributed/test_modes.py::test_batch_and_sequence_change_between_steps[3",
    "distributed/test_modes.py::test_evaluation_between_steps[1",
    "distributed/test_modes.py::test_ranks_may_have_other_sizes_in_the_same_step_with_dynamic[0]",
    "distributed/test_modes.py::test_ranks_may_have_other_sizes_in_the_same_step_with_dynamic[1]",
    "distributed/test_muon.py::test_a_state_is_loaded_by_another_number_of_ranks",
    "distributed/test_muon.py::test_updates_are_those_of_one_rank[4]",
    "distributed/test_parameters.py::test_a_hugging_face_model_built_on_meta[1]",
    "distributed/test_parameters.py::test_uneven_sizes[4",
    "distributed/test_pieces.py::test_a_rank_that_was_late_once",
    "distributed/test_pieces.py::test_checkpoints_of_captured_code_are_taken",
    "distributed/test_pieces.py::test_training_is_that_of_ddp[0-Branching",
    "distributed/test_pieces.py::test_training_is_that_of_ddp[0-Layer]",
    "distributed/test_pieces.py::test_training_is_that_of_ddp[0-Printing",
    "distributed/test_pieces.py::test_training_is_that_of_ddp[1-",
    "distributed/test_pieces.py::test_what_eager_code_writes_to_a_parameter_is_kept[0-Clamped]",
    "distributed/test_pieces.py::test_with_other_options[{'offload': 'parameters'}]",
    "distributed/test_same_program.py::test_another_run_file_on_one_rank[4]",
    "distributed/test_same_program.py::test_models_called_in_another_order[4]",
    "distributed/test_same_program.py::test_ranks_that_drift_apart[evaluate_once_more-3-1-4]",
    "distributed/test_same_program.py::test_ranks_that_drift_apart[skip_a_backward-1-0-4]",
    "distributed/test_same_program.py::test_ranks_that_drift_apart[skip_a_backward-3-0-2]",
    "distributed/test_same_program.py::test_ranks_that_drift_apart[skip_a_backward-3-0-4]",
    "distributed/test_same_program.py::test_ranks_that_take_heads_of_their_own[take_compiled_heads-4]",
    "distributed/test_same_program.py::test_ranks_that_take_heads_of_their_own[take_new_heads-2]",
    "distributed/test_same_program.py::test_ranks_that_take_heads_of_their_own[take_new_heads-4]",
    "distributed/test_watch.py::test_the_others_end_with_the_reason[2-skips",
    "distributed/test_zoo.py::test_losses_and_gradients_are_those_of_ddp[gpt2",
    "hf/test_ranks.py::test_ranks_may_begin_with_batches_of_other_sizes",
    "hf/test_ranks.py::test_seq2seq_predicts_by_generating",
    "hf/test_ranks.py::test_the_moments_of_stage_1_may_lie_on_disk_and_are_resumed",
    "kernels/test_kernels.py::test_the_kernels_of_captured_steps_are_their_steps",
    "kernels/test_matmul.py::test_those_of_captured_steps",
    "kernels/test_targets.py::test_kernels_compile_without_spills[64]",
    "kernels/test_targets.py::test_kernels_that_sweep_over_rows_compile_without_spills",
    "kernels/test_targets.py::test_the_kernels_of_captured_models_compile_without_spills[of_demo]",
    "passes/test_bucket.py::test_what_is_computed_again_stays_where_it_is_needed[2000",
    "pl/test_ranks.py::test_the_losses_are_those_over_ddp_and_a_checkpoint_resumes_at_two_ranks_and_at_one[Parts-1",
    "single/test_adamw.py::test_a_compiled_model_is_trained_the_same[options2]",
    "single/test_benchmark_gpu.py::test_groups_updates_and_whole_steps_are_measured",
    "single/test_custom_ops.py::test_it_trains_as_eagerly[View",
    "single/test_depth.py::test_grown_from_two_three_and_four_layers[build0-5]",
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
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[always-never-3",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-always-2",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-auto-0",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-auto-1",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-auto-2",
    "trust/test_memory_certificate.py::test_it_is_the_plans_in_a_budget[auto-never",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 0]",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 1]",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 2, fused]",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 2, recomputed]",
    "trust/test_mutations.py::test_single_faults_are_refused[llama, stage 3, activations on the host]",
    "trust/test_mutations.py::test_single_faults_are_refused[norms, stage 1]",
)
"""Slow tests with a sibling that `make test` runs: beginnings of names, within this folder."""


SAMPLED: tuple[str, ...] = (
    "browser/test_opening.py::test_an_address_that_names_what_is_not_there_is_told_and_the_default_shown",
    "browser/test_page.py::test_it_fits_the_window_in_light_and_dark",
    "browser/test_pictures.py::test_a_saved_svg_stands_alone_in_the_theme_at_hand",
    "browser/test_pictures.py::test_both_are_copied",
    "cli/test_bisect.py::test_a_wrong_rewrite_is_found",
    "distributed/test_accumulation.py::test_clip_grad_norm",
    "distributed/test_accumulation.py::test_four_micro_steps",
    "distributed/test_arena.py::test_training_is_that_of_ddp",
    "distributed/test_autograd.py::test_a_loader_that_ends_within_an_accumulation",
    "distributed/test_autograd.py::test_a_post_accumulate_hook_sees_what_is_reduced",
    "distributed/test_autograd.py::test_gradients_are_where_autograd_was_asked_to_bring_them",
    "distributed/test_autograd.py::test_second_derivatives_run_eagerly_or_say_so",
    "distributed/test_autograd.py::test_what_no_sync_leaves_is_in_grad",
    "distributed/test_bad_forward.py::test_a_model_converted_after_compile",
    "distributed/test_bad_forward.py::test_a_second_backward_with_retain_graph",
    "distributed/test_bad_forward.py::test_forwards_that_cannot_be",
    "distributed/test_bad_options.py::test_options_that_mean_nothing",
    "distributed/test_bad_state.py::test_state_dicts_that_do_not_fit",
    "distributed/test_changed.py::test_modules_without_parameters_and_hooks_may_change",
    "distributed/test_changed.py::test_other_parameters_are_refused_by_name",
    "distributed/test_checkpoint.py::test_a_state_dict_has_the_names_and_the_values_of_the_plain_model",
    "distributed/test_copies.py::test_training_is_that_of_ddp",
    "distributed/test_eager.py::test_gradients_are_those_of_ddp",
    "distributed/test_engine.py::test_gradients_that_are_not_finite_skip_the_step",
    "distributed/test_engine.py::test_losses_and_gradient_norms_are_those_of_plain_training",
    "distributed/test_flat_updates.py::test_updates_of_uneven_shards_are_those_of_whole_parameters",
    "distributed/test_fusion.py::test_training_with_kernels_is_that_of_ddp",
    "distributed/test_join.py::test_loaders_of_other_lengths_train_as_under_ddps_join",
    "distributed/test_modes.py::test_a_rank_that_meets_a_new_size_alone_does_not_disturb_the_others",
    "distributed/test_modes.py::test_batch_norm_statistics_are_those_of_the_first_rank_under_ddp",
    "distributed/test_modes.py::test_evaluation_between_steps",
    "distributed/test_modes.py::test_ranks_may_begin_with_other_sizes",
    "distributed/test_muon.py::test_updates_are_those_of_one_rank",
    "distributed/test_offload.py::test_training_is_that_of_ddp",
    "distributed/test_optimizers.py::test_optimizers",
    "distributed/test_optimizers.py::test_post_accumulate_grad_hooks_run",
    "distributed/test_parameters.py::test_a_model_built_on_meta",
    "distributed/test_parameters.py::test_frozen_and_unused_parameters",
    "distributed/test_parameters.py::test_tied_weights",
    "distributed/test_parameters.py::test_uneven_sizes",
    "distributed/test_pieces.py::test_training_is_that_of_ddp",
    "distributed/test_pieces.py::test_what_eager_code_writes_to_a_parameter_is_kept",
    "distributed/test_ranks_differ.py::test_ranks_that_do_not_agree",
    "distributed/test_reductions.py::test_gradients_are_reduced_as_their_type_says",
    "distributed/test_saving.py::test_a_copy_computes_with_values_of_its_own",
    "distributed/test_saving.py::test_a_state_dict_comes_back",
    "distributed/test_saving.py::test_training_goes_on_from_what_was_saved",
    "distributed/test_unused.py::test_they_have_no_gradient_and_do_not_decay",
    "distributed/test_zoo.py::test_losses_and_gradients_are_those_of_ddp",
    "passes/test_fit.py::test_it_fits_wherever_an_extreme_does",
    "passes/test_random_graphs.py::test_every_pass_leaves_a_valid_graph_that_reads_back",
    "passes/test_within.py::test_the_smallest_budget_of_a_llama",
    "single/test_depth.py::test_layers_that_differ_are_all_captured",
    "single/test_dtypes.py::test_every_spelling_is_one_dtype",
    "single/test_fusion.py::test_a_fused_step_gives_the_same_numbers",
    "single/test_optimizers.py::test_ten_steps_are_those_of_torch_and_of_the_paper",
)
"""Tests of many cases that take long: `make test` runs the first and the last of each."""


def left_out(names: Sequence[str]) -> set[str]:
    """The tests among these that `make test` leaves out, by their names within this folder, in order."""
    if DEEP:
        return set()
    found = {name for name in names if name.startswith(LEFT_OUT)}
    for test in SAMPLED:
        cases = [name for name in names if name.startswith(f"{test}[") and name not in found]
        found.update(cases[1:-1])
    return found


def stale(names: Collection[str]) -> list[str]:
    """The entries of both tables that name none of these tests, of files that are among them with all their tests."""
    files = {name.partition("::")[0] for name in names}
    here = [entry for entry in (*LEFT_OUT, *SAMPLED) if entry.partition("::")[0] in files]
    return [entry for entry in here if not any(name.startswith(entry) for name in names)]

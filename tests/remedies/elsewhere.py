"""Messages whose remedy is done by another test, by a case that asks for other words, or by nobody, and why.

Each is named by words that no other message has.
"""

BUTTON = "the words of a button, a heading or a help text, which ask for nothing"
JUDGEMENT = "asks to look, which nothing but a person does"

TESTS = {  # that do it
    "Open the page first.": "tests/test_app_security.py::test_an_unused_upload_is_private_and_makes_room_for_the_next",
    "Too many uploads are waiting": "tests/test_app_security.py::test_uploads_that_wait_have_a_limit_together",
    "Too many wrong passwords": "tests/test_app_security.py::test_guessing_a_password_is_slow_and_logged",
    "are also prompts of the comparison": "tests/test_app_data.py::test_rows_that_the_comparison_will_ask_are_told_of",
    "Your files together take more than": (
        "tests/test_app_security.py::test_what_a_session_keeps_of_uploads_has_a_limit_and_goes_when_it_is_replaced"
    ),
    "The file unpacks to more than": (
        "tests/test_app_data.py::test_a_small_file_that_becomes_large_is_refused_and_a_slow_one_is_ended"
    ),
    "Upload the files it names here": (
        "tests/test_app_data.py::test_what_the_form_cannot_show_of_a_recipe_is_kept_or_told"
    ),
    "Too many jobs are waiting": "tests/test_app_jobs.py::test_a_full_queue_says_so_and_a_closed_one_ends_everything",
    "gives the answers in `harmful_data` already": (
        "tests/test_trained_vectors.py::test_a_model_that_gives_the_answers_already_is_named"
    ),
    "Start from an aligned model, or give": (
        "tests/test_refusal_anchor.py::test_a_start_that_does_not_refuse_is_warned_of_with_the_share"
    ),
    "and add no refusals. Start from an aligned model": (
        "tests/test_security_vectors.py::test_a_start_that_complies_with_harmful_requests_is_warned_of_with_the_share"
    ),
    "answers could not be judged": (
        "tests/test_trained_vectors.py::test_answers_that_cannot_be_judged_are_counted_and_said"
    ),
    "could not be saved (\0) and was removed": (
        "tests/test_crash.py::test_a_full_disk_is_told_and_leaves_earlier_checkpoints_to_go_on_from"
    ),
    "stopped after step": (
        "tests/test_stopping.py::test_the_first_signal_saves_a_checkpoint_that_goes_on_to_the_same_end"
    ),
    "Run the same command again to continue": (
        "tests/test_scan.py::test_a_scan_that_was_stopped_continues_and_one_of_other_rows_starts_anew"
    ),
    "Run the command again for the rest": (
        "tests/test_cli_compare.py::test_ctrl_c_keeps_what_was_answered_and_exits_with_130"
    ),
    "There is no terminal to take keys from": "tests/test_review.py::test_without_a_terminal_the_remedy_is_named",
    "found no such task": "tests/test_harness.py::test_the_command_line_asks_tasks_and_can_be_repeated",
    "has no metric that is right or wrong": (
        "tests/test_harness.py::test_tasks_are_counted_as_the_harness_does_and_paired_over_adapters"
    ),
    "`harmful` has": "tests/test_metrics.py::test_answers_can_be_added_in_batches_and_each_needs_its_label",
    "DeepSpeed ZeRO-3 has split them": (
        "tests/test_monitor.py::test_a_model_that_is_split_is_told_from_one_with_another_vocabulary"
    ),
    "gave no verdict on": "tests/test_comparison.py::test_a_judge_that_fails_on_one_answer_costs_one_verdict",
    "cut off while still thinking": "tests/test_comparison.py::test_answers_cut_off_while_thinking_are_named",
    "because they were cut off": "tests/test_comparison.py::test_answers_that_are_cut_off_are_no_collapse",
    "cannot be merged: \0 Use it as it is": (
        "tests/test_lora_io.py::test_what_cannot_be_merged_says_so_and_leaves_nothing"
    ),
    "`trainable_token_indices` does not work": (
        "tests/test_peft_options.py::test_tokens_of_a_tied_head_are_refused_with_what_works"
    ),
    "it does not act on biases": (
        "tests/test_peft_options.py::test_biases_that_a_penalty_does_not_see_are_told_and_those_past_a_projector_refused"
    ),
    "the methods would take what was trained": (
        "tests/test_resuming.py::test_a_model_that_was_loaded_from_the_checkpoint_is_no_start"
    ),
    "is not in memory: it is offloaded": "tests/test_devices.py::test_an_offloaded_model_is_measured_as_one_in_memory",
    "The model's weights are not in this process (offloaded": (
        "tests/test_security_vectors.py::test_vectors_fitted_on_two_processes_are_those_of_the_first"
    ),
    "the safety loss ended at": (
        "tests/test_safe_grad.py::test_a_trust_region_that_did_not_hold_is_said_to_have_failed"
    ),
    "Run the same recipe again with": "tests/test_recipe.py::test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on",
    "The training loss hardly fell": "tests/test_recipe.py::test_a_run_whose_loss_hardly_fell_says_so",
    "What was trained could not be saved": (
        "tests/test_stopping.py::test_a_full_disk_behind_training_is_told_and_gone_on_from"
    ),
    "Leave out --dry-run to start": "tests/test_recipe.py::test_a_shown_plan_says_that_nothing_was_trained",
    "This installation has no app": (
        "tests/test_cli.py::test_an_installation_without_the_app_is_told_of_and_a_checkout_has_it"
    ),
    "needs \0 GB in": (
        "tests/test_real_model.py::test_a_disk_without_room_is_reported_before_anything_is_fetched_and_another_is_taken"
    ),
    "could not be converted": (
        "tests/test_real_model.py"
        "::test_a_file_that_cannot_be_converted_is_named_with_the_reason_and_may_be_converted_again"
    ),
    "The converted \0 answers": (
        "tests/test_real_model.py::test_a_model_that_does_not_know_what_it_should_is_refused_and_not_kept"
    ),
    "Nothing to compare yet": (
        "tests/test_app_runs.py::test_the_history_names_runs_with_time_verdict_and_recipe_and_survives_a_restart"
    ),
}
CASES = {  # that do it, and ask for other words
    "The basis holds what layers read": "inputs at other tokens",
    "has several splits. Name one": "a dataset with splits",
    "has the splits": "splits in memory",
    "must be a tuple of prompts, got one text": "one prompt that is no tuple",
    "holds no rows": "no rows",
    "but the LoRA of `\0` sits on": "a LoRA on embeddings",
    "`decay` of `AdapterEMA` was": "an average of another decay",
    "does not work with `\0`, which changes the base weights": "a start model that the LoRA changes",
    "no projector stands between a bias": "a bias of the LoRA",
    "came with a LoRA that SaLoRA did not make": "a LoRA that SaLoRA did not make",
}
UNDONE = {
    "Not enough memory. Choose a smaller batch": "takes a GPU that runs out of memory",
    "found no LoRA layer of the adapter": "takes a LoRA without layers, which this PEFT makes of no configuration",
    "Look at the over-refusal rate afterwards": JUDGEMENT,
    **dict.fromkeys(
        (
            "Start here: ", "Using \0. Drop another", "could not be used. Drop another", "Choose one or more. Keep",
            "Show the version", "Show the traceback", "Open the browser", "The app runs at", "Take only rows with",
            "Ask only the first questions", "Write an adapter again, with", "Upload weights, tokenizer", "Show me how",
            "Make a new repository", "Check everything and show", "Resume from the last checkpoint in the output",
            "Here is a plan", "You will need some things", "Name of the format", "Split of the dataset; may",
            "Split of the dataset on", "Name in tables",
        ),
        BUTTON,
    ),
}  # fmt: skip

"""What elision would compute wrongly is refused in one line, on every rank."""

from __future__ import annotations

import pytest

pytest.importorskip("megatron.core", reason="pip install 'regate-ds[megatron]'")

from tests.adapters.megatron import refusals_helper as refusals
from tests.adapters.megatron.cases_helper import Case
from tests.adapters.megatron.pool_helper import Pool


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_refused_by_name_and_left_alone(pool: Pool):
    pool.run(1, refusals.check_attach, Case())


@pytest.mark.slow
def test_positions_of_one_axis_for_a_model_of_three_are_refused(pool: Pool):
    pool.run(1, refusals.check_positions, Case(positions="mrope"))


@pytest.mark.slow
def test_models_and_rows_that_cannot_be_merged_are_refused(pool: Pool):
    pool.run(1, refusals.check_merging, Case(merged=3))


@pytest.mark.slow
def test_samples_that_the_host_cuts_otherwise_than_the_plan_are_refused(pool: Pool):
    pool.run(1, refusals.check_samples, Case(row_format="ragged", packed=True))


@pytest.mark.slow
def test_latent_attention_of_which_tensor_ranks_lack_a_gradient_is_refused(pool: Pool):
    pool.run(2, refusals.check_latent, Case(model="latent", tp=2, sp=True))


@pytest.mark.slow
def test_with_interleaving_the_gather_must_be_in_the_first_chunk(pool: Pool):
    pool.run(2, refusals.check_virtual_range, Case(pp=2, vpp=2, num_layers=8))


@pytest.mark.slow
def test_an_error_of_one_rank_that_plans_is_an_error_of_all_replicas(pool: Pool):
    case = Case(pp=2, dp=2)
    pool.run(case.world, refusals.check_steps, case)

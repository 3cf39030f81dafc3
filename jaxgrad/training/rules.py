"""The rule of one update: `sgd_update`, or an optax transformation's."""

from __future__ import annotations

from typing import Any

from jaxgrad.pytrees import PyTree
from jaxgrad.sgd import Schedule, init_sgd, sgd_update


def update_rule(schedule: Schedule | None, optimizer: Any) -> tuple[Any, Any]:
    """`init(params)` and `update(params, grads, state, rate, value, value_fn)`."""
    if optimizer is None:

        def by_hand(
            params: PyTree, grads: PyTree, state: PyTree, rate: Any, *_: Any
        ) -> tuple[PyTree, PyTree]:
            return sgd_update(
                params,
                grads=grads,
                state=state,
                learning_rate=schedule or rate,
            )

        return init_sgd, by_hand

    import optax

    transform = optax.with_extra_args_support(optimizer)

    def by_optax(
        params: PyTree, grads: PyTree, state: PyTree, _: Any, value: Any, value_fn: Any
    ) -> tuple[PyTree, PyTree]:
        updates, state = transform.update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state

    return transform.init, by_optax

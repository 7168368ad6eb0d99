"""Count what a model costs, and find what a target allows: how many groups to remove and how many bits to spend.

Nothing here knows which method asks. Before training:

- `ledger.Ledger` holds the sizes of all tensors and what each group takes from them, so that parameters, BOPs and bytes
  are counted without the model. `model_costs.measure_costs` counts those of a model at hand.
- `targets.solve_target` turns a config's targets into a `Target`: an amount that remains, and budgets for widths.

While a method trains and when it ends:

- `selection.find_chunks` sorts groups by score within the limits, and `targets.take_due` takes as many as are due.
- `quantizer_table.Quantizers` reads and writes all (d, q_m, t) as three flat vectors.
- `sensitivity.measure_errors` measures what rounding weights costs, `input_sensitivity.input_errors` estimates it for
  inputs, and `bit_allocation.allocate_bits` spends the budgets: BOPs on both by `product_allocation.allocate_products`.
- `joint_allocation.allocate_jointly` decides in one currency which groups are removed and how many bits remain.
"""

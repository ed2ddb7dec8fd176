"""Conformance: what a component of each kind must do, as functions (`checks`) and classes (`conformance`).

Shipped in the wheel for plugin authors; the same checks run for the components in this repository and in
`vqcore plugins --check`.
"""

"""The conformance kit: the laws of each kind of component, as functions (`checks`) and test classes (`conformance`).

The wheel contains the kit for plugin authors. The same checks run for the components in this repository and in
`vqcore plugins --check`.
"""

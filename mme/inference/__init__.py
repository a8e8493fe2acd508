"""A trained model without a process group: loading, scoring, recommending, exporting."""

"""Colours and marks of the methods, the same in all figures."""

STYLES = {
    "jd-full": ("#0072B2", "o"),
    "jd-diag": ("#009E73", "s"),
    "svd": ("#D55E00", "^"),
    "hydraopt": ("#CC79A7", "P"),
    "ties": ("#999999", "v"),
    "task-arithmetic": ("#999999", "<"),
    "dare": ("#999999", ">"),
    "none": ("#555555", "D"),
    "share": ("#E69F00", "X"),
    "cores trained": ("#000000", "h"),
    "plain": ("#56B4E9", "*"),
}

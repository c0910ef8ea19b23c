"""A cache that grows under a budget: sealed pages whose precision only goes down."""

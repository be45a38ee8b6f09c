"""Turn rows from anywhere into leak-free conversations, and prove what the loss covers.

A recipe's `data` section and the model's tokenizer come in. Prepared train, validation and test splits go out, with
ledger, leak report and the gate's counts, kept under a fingerprint of what decided them. It never tokenizes in a second
way, never drops a row uncounted, and never lets two splits share a group.

Use `prepared.prepare`, `audited.audit_once`, `gate.Audit` and `splitting`.
"""

"""Answer people's questions with a finished run.

A run's folder and a conversation come in. The answers of base and tuned model go out as text while they are made, with
the nearest training questions and, in an emergency, where to call. It never trains, never logs what is asked or
answered, and never listens to anybody but this machine.

Use `assistant.Assistant`, `chat.chat`, `chat.ask`, `server.serve`, `evidence.build_evidence` and
`emergencies.emergency_notice`.
"""

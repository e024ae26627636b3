"""Lab: routing traces, replay of policies, live measurements and tuning."""

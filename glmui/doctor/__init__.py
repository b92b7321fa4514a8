"""The doctor: looks at everything glmui stands on, says what is wrong and the one thing to do about it."""

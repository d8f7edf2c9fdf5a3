"""Operations recorded as they run, and made again: by their own code, or compiled."""

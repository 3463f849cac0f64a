"""The teacher's side of Preceptor."""

if [ $((2 + 2)) -ne FOUR ]; then
  echo "not FOUR" >&2
  exit 1
fi

read -r name
sum=0
for word in "$@"; do sum=$((sum + word)); done
echo "Hello $name $sum"

name = $stdin.gets.strip
puts "Hello #{name} #{ARGV.sum(&:to_i)}"

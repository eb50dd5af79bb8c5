# What fluentd makes of infrastructure/fluentd.yaml in a pod of its DaemonSet, as JSON: the parameters of each section,
# with their embedded Ruby evaluated as fluentd does it, and the record that its filters make of one.
#
#   ruby tests/testbed/fluentd.rb infrastructure/fluentd.yaml STREAM [NAME=VALUE …]
require "json"
require "yaml"

# `use_nil` and `use_default` leave a parameter out (fluentd's documentation, "Embedded Ruby Code").
class Absent < StandardError; end

def use_nil = raise(Absent)
def use_default = raise(Absent)

file, stream, *more = ARGV
documents = YAML.load_stream(File.read(file), filename: file)
configuration = documents.find { |one| one["kind"] == "ConfigMap" }["data"]
pod = documents.find { |one| one["kind"] == "DaemonSet" }.dig("spec", "template", "spec")
ENV.clear
# Every container has these.
ENV["KUBERNETES_SERVICE_HOST"] = "10.96.0.1"
ENV["KUBERNETES_SERVICE_PORT"] = "443"
pod["containers"].first["env"].each { |one| ENV[one["name"]] = one["value"] || "from #{one['valueFrom'].keys.first}" }
more.each { |one| ENV.store(*one.split("=", 2)) }

sections = []
open_sections = []
configuration["fluent.conf"].each_line.with_index(1) do |line, number|
  case line.strip
  when "", /\A#/ then next
  when %r{\A</(\w+)>\z}
    abort "line #{number}: nothing to close" unless open_sections.pop&.fetch("name") == $1
  when /\A<(\w+)(?: ([^<>]+))?>\z/
    open_sections.push({ "name" => $1, "argument" => $2, "within" => open_sections.map { |one| one["name"] }, "parameters" => {} })
    sections.push(open_sections.last)
  when /\A(\S+)\s+(".*")\z/
    name, literal = $1, $2
    value = begin
      eval(literal, binding, file, number)
    rescue Absent
      nil
    end
    abort "line #{number}: #{name} is empty, and not left out: #{literal}" if value == "" && literal != '""'
    open_sections.last["parameters"][name] = value
  when /\A(\S+)(?:\s+(.*))?\z/
    open_sections.last["parameters"][$1] = $2
  end
end
abort "not closed: #{open_sections.map { |one| one['name'] }}" unless open_sections.empty?

# A line of the container runtime, through the parser, concat and record_transformer, with what kubernetes_metadata knows
# of its pod.
parameters = ->(type) { sections.find { |one| one["parameters"]["@type"] == type }["parameters"] }
pattern = Regexp.new(parameters.("regexp")["expression"].delete_prefix("/").delete_suffix("/"))
record = pattern.match("2026-01-31T12:00:00.123456789Z #{stream} F a line").named_captures.except("time")
concat = parameters.("concat")
abort "pieces of both streams are joined" unless concat["stream_identity_key"] == concat["partial_cri_stream_key"]
# That of a line that is whole it takes away, whatever it is told (fluent-plugin-concat 2.5).
record.delete(concat["partial_cri_stream_key"])
record.delete(concat["partial_cri_logtag_key"]) unless concat["keep_partial_key"] == "true"
record["kubernetes"] = {
  "container_name" => "runner", "namespace_name" => "user-ada", "pod_name" => "shop-1", "host" => "node-1",
  "labels" => { "gantry.dev/user" => "ada", "gantry.dev/repl" => "shop" }, "namespace_labels" => {}
}
fields = sections.find { |one| one["name"] == "record" }["parameters"]
made = fields.transform_values { |value| value.gsub(/\$\{(.*)\}/) { eval($1).to_s } }

puts JSON.generate({ sections:, made:, template: configuration["template.json"] })

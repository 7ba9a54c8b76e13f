{{/* The configuration files: values become TOML that the binaries read. */}}

{{/* A size in bytes, of dict "value" (a number or a quantity) "name" (for the message). Not in exponent form. */}}
{{- define "cacheclip.bytes" -}}
{{- if kindIs "string" .value -}}
{{- $units := dict "" 1
  "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000
  "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776
-}}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?" .value -}}
{{- $unit := trimPrefix $number .value -}}
{{- if or (empty $number) (not (hasKey $units $unit)) -}}
{{- fail (printf "%s: %q is no size; write a number of bytes or a quantity like 512Mi" .name .value) -}}
{{- end -}}
{{- printf "%.0f" (mulf (float64 $number) (float64 (get $units $unit))) -}}
{{- else -}}
{{- printf "%.0f" (float64 .value) -}}
{{- end -}}
{{- end -}}

{{/* One TOML value, of dict "key" "value". JSON's strings are TOML's basic strings. */}}
{{- define "cacheclip.tomlValue" -}}
{{- if hasSuffix "_bytes" .key -}}
{{- include "cacheclip.bytes" (dict "value" .value "name" .key) -}}
{{- else if kindIs "string" .value -}}
{{- toJson .value -}}
{{- else if kindIs "bool" .value -}}
{{- .value -}}
{{- else if kindIs "slice" .value -}}
{{- $items := list -}}
{{- range .value }}{{ $items = append $items (include "cacheclip.tomlValue" (dict "key" "" "value" .)) }}{{ end -}}
{{- printf "[%s]" (join ", " $items) -}}
{{- else if eq (float64 .value) (floor .value) -}}
{{- /* Helm reads every number as a float; large ones would come out in exponent form, which is no integer. */ -}}
{{- printf "%.0f" (float64 .value) -}}
{{- else -}}
{{- toJson .value -}}
{{- end -}}
{{- end -}}

{{/* A TOML document, of dict "table" and "path" ("" at the root): plain fields first, as TOML wants them. */}}
{{- define "cacheclip.toml" -}}
{{- $path := .path -}}
{{- range $key, $value := .table -}}
{{- if and (not (kindIs "map" $value)) (not (kindIs "invalid" $value)) }}
{{ $key }} = {{ include "cacheclip.tomlValue" (dict "key" $key "value" $value) }}
{{- end -}}
{{- end -}}
{{- range $key, $value := .table -}}
{{- if and (kindIs "map" $value) $value }}
{{- $inner := ternary $key (printf "%s.%s" $path $key) (empty $path) }}

[{{ $inner }}]
{{- include "cacheclip.toml" (dict "table" $value "path" $inner) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
One service's configuration file, of dict "root" "component" "values" "port" "own". `own` holds what the chart decides;
it stands over `values.config`, which the schema keeps free of these fields.
*/}}
{{- define "cacheclip.config" -}}
{{- $host := .root.Values.listenHost -}}
{{- $listen := dict
  "listen" (printf "%s:%s" $host .port)
  "admin_listen" (printf "%s:%s" $host (include "cacheclip.port.admin" .))
-}}
{{- $config := mergeOverwrite (deepCopy .values.config) (dict "service" $listen) .own -}}
# What the chart decides and what stands under `config` in its values. Secrets come by environment.
{{- include "cacheclip.toml" (dict "table" $config "path" "") }}
{{- end -}}

{{/* Ports: the services' own defaults for gRPC, one admin port for all. */}}
{{- define "cacheclip.port.gateway" -}}7070{{- end -}}
{{- define "cacheclip.port.gpu-worker" -}}7072{{- end -}}
{{- define "cacheclip.port.cache-store" -}}7073{{- end -}}
{{- define "cacheclip.port.aux-scorer" -}}7074{{- end -}}
{{- define "cacheclip.port.redis" -}}6379{{- end -}}
{{- define "cacheclip.port.admin" -}}9090{{- end -}}

{{/*
Whole configuration of a component, of dict "root". A gateway waits as long for a worker's description as a worker may
take to start; giving up sooner would only have it restarted.
*/}}
{{- define "cacheclip.config.gateway" -}}
{{- $root := .root -}}
{{- $own := dict
  "model_dir" (include "cacheclip.models.dir" (dict "root" $root "model" "primary"))
  "workers" (list (include "cacheclip.peers" (dict "root" $root "component" "gpu-worker")))
  "scorers" (list (include "cacheclip.peers" (dict "root" $root "component" "aux-scorer")))
  "scope_key_id" $root.Values.scopeSecret.keyId
  "describe_timeout_seconds" $root.Values.gpuWorker.startupSeconds
-}}
{{- $port := include "cacheclip.port.gateway" . -}}
{{- include "cacheclip.config" (dict "root" $root "values" $root.Values.gateway "port" $port "own" $own) -}}
{{- end -}}

{{- define "cacheclip.config.gpu-worker" -}}
{{- $root := .root -}}
{{- $own := dict
  "model_dir" (include "cacheclip.models.dir" (dict "root" $root "model" "primary"))
  "stores" (list (include "cacheclip.peers" (dict "root" $root "component" "cache-store")))
-}}
{{- $values := deepCopy $root.Values.gpuWorker -}}
{{- /* A worker that was given a GPU must not compute on the CPU because its image is the wrong one. */ -}}
{{- if eq $values.profile "gpu" -}}
{{- $cuda := dict "device" "cuda" "cuda" (dict "kept" (include "cacheclip.kernels" .)) -}}
{{- $_ := set $values "config" (mergeOverwrite $cuda $values.config) -}}
{{- end -}}
{{- $port := include "cacheclip.port.gpu-worker" . -}}
{{- include "cacheclip.config" (dict "root" $root "values" $values "port" $port "own" $own) -}}
{{- end -}}

{{- define "cacheclip.config.aux-scorer" -}}
{{- $root := .root -}}
{{- $own := dict
  "model_dir" (include "cacheclip.models.dir" (dict "root" $root "model" "auxiliary"))
  "stores" (list (include "cacheclip.peers" (dict "root" $root "component" "cache-store")))
-}}
{{- $port := include "cacheclip.port.aux-scorer" . -}}
{{- include "cacheclip.config" (dict "root" $root "values" $root.Values.auxScorer "port" $port "own" $own) -}}
{{- end -}}

{{/* `node` and `advertise` differ from pod to pod and come by environment. */}}
{{- define "cacheclip.config.cache-store" -}}
{{- $root := .root -}}
{{- $index := dict "kind" (include "cacheclip.index" $root) -}}
{{- if eq $index.kind "redis" -}}
{{- $external := $root.Values.externalRedis -}}
{{- if $root.Values.redis.enabled -}}
{{- $host := include "cacheclip.component" (dict "root" $root "component" "redis") -}}
{{- $port := include "cacheclip.port.redis" . -}}
{{- $_ := set $index "urls" (list (printf "redis://%s.%s.svc:%s" $host $root.Release.Namespace $port)) -}}
{{- else -}}
{{- $_ := set $index "urls" $external.urls -}}
{{- $_ := set $index "cluster" $external.cluster -}}
{{- with $external.username }}{{ $_ := set $index "username" . }}{{ end -}}
{{- with $external.caSecret }}{{ $_ := set $index "ca_file" "/etc/cacheclip-redis/ca.crt" }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if empty $root.Values.cacheStore.config.index.namespace -}}
{{- $_ := set $index "namespace" (include "cacheclip.redisNamespace" $root) -}}
{{- end -}}
{{- $own := dict "data_dir" "/var/lib/cacheclip/store" "index" $index -}}
{{- $port := include "cacheclip.port.cache-store" . -}}
{{- include "cacheclip.config" (dict "root" $root "values" $root.Values.cacheStore "port" $port "own" $own) -}}
{{- end -}}

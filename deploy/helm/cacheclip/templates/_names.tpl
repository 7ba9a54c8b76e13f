{{/* Names, labels and addresses. `.` is the root context unless a helper says otherwise. */}}

{{- define "cacheclip.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 40 characters: the longest component and a pod's suffix must fit into 63 behind it. */}}
{{- define "cacheclip.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "cacheclip.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Of dict "root" . "component" "gateway": what a component's objects are called. */}}
{{- define "cacheclip.component" -}}
{{- printf "%s-%s" (include "cacheclip.fullname" .root) .component -}}
{{- end -}}

{{/* What selects the pods of a release; with "component", of one component. Never changes in a release's life. */}}
{{- define "cacheclip.selector" -}}
app.kubernetes.io/name: {{ include "cacheclip.name" .root }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* Labels of an object, of dict "root" "component" (may be left out). */}}
{{- define "cacheclip.labels" -}}
{{ include "cacheclip.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Of these, what pods carry: nothing that changes with the chart alone, because that would replace every pod. */}}
{{- define "cacheclip.podLabels" -}}
{{ include "cacheclip.selector" . }}
app.kubernetes.io/part-of: cacheclip
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "cacheclip.serviceAccount" -}}
{{- $own := ternary (include "cacheclip.fullname" .) "default" .Values.serviceAccount.create -}}
{{- default $own .Values.serviceAccount.name -}}
{{- end -}}

{{- define "cacheclip.scopeSecret" -}}
{{- default (printf "%s-scope" (include "cacheclip.fullname" .)) .Values.scopeSecret.existingSecret -}}
{{- end -}}

{{/* "redis", or "embedded" where every store has an index of its own. */}}
{{- define "cacheclip.index" -}}
{{- ternary "redis" "embedded" (or .Values.redis.enabled (not (empty .Values.externalRedis.urls))) -}}
{{- end -}}

{{/* The Secret with Redis' password; nothing where there is no password. */}}
{{- define "cacheclip.redisSecret" -}}
{{- if .Values.redis.enabled -}}
{{- default (printf "%s-redis" (include "cacheclip.fullname" .)) .Values.redis.existingSecret -}}
{{- else -}}
{{- .Values.externalRedis.existingSecret -}}
{{- end -}}
{{- end -}}

{{- define "cacheclip.redisKey" -}}
{{- ternary .Values.redis.passwordKey .Values.externalRedis.passwordKey .Values.redis.enabled -}}
{{- end -}}

{{/* Prefix of all Redis keys: namespace and release, so that no two releases meet; at most 64 characters. */}}
{{- define "cacheclip.redisNamespace" -}}
{{- $name := printf "cacheclip-%s-%s" .Release.Namespace .Release.Name -}}
{{- if gt (len $name) 64 -}}
{{- $name = printf "%s-%s" (trunc 47 $name) (sha256sum $name | trunc 16) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* A headless name, of dict "root" "component": every pod behind it is one peer. */}}
{{- define "cacheclip.peers" -}}
{{- $port := include (printf "cacheclip.port.%s" .component) . -}}
{{- printf "dns+http://%s.%s.svc:%s" (include "cacheclip.component" .) .root.Release.Namespace $port -}}
{{- end -}}

{{/* One image, of dict "root" "image" (repository, tag, digest) and "suffix" (may be left out). */}}
{{- define "cacheclip.image" -}}
{{- $shared := .root.Values.image -}}
{{- $repository := .image.repository -}}
{{- with $shared.registry }}{{ $repository = printf "%s/%s" . $repository }}{{ end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- $tag := .image.tag | default $shared.tag | default .root.Chart.AppVersion -}}
{{- printf "%s:%s%s" $repository $tag (default "" .suffix) -}}
{{- end -}}
{{- end -}}

{{/* The port that a URL means, of dict "url" "default". */}}
{{- define "cacheclip.url.port" -}}
{{- $authority := regexReplaceAll "^[a-z]+://([^/]*).*$" .url "${1}" -}}
{{- $port := regexFind ":[0-9]+$" $authority | trimPrefix ":" -}}
{{- default .default $port -}}
{{- end -}}

{{/* Models: where a pod finds its files and how they get there. `model` is "primary" or "auxiliary". */}}

{{/* The model's directory in a service's container, of dict "root" "model". */}}
{{- define "cacheclip.models.dir" -}}
{{- $bundled := dict
  "primary" "/usr/share/cacheclip/models/tiny/primary"
  "auxiliary" "/usr/share/cacheclip/models/tiny/aux"
-}}
{{- if eq (get .root.Values.models .model).source "bundled" -}}
{{- get $bundled .model -}}
{{- else -}}
{{- printf "/models/%s" .model -}}
{{- end -}}
{{- end -}}

{{/* "yes" where an init container copies and checks files. */}}
{{- define "cacheclip.models.copied" -}}
{{- if has (get .root.Values.models .model).source (list "image" "url") -}}yes{{- end -}}
{{- end -}}

{{- define "cacheclip.models.mounts" -}}
{{- $model := get .root.Values.models .model -}}
{{- if ne $model.source "bundled" -}}
- name: model
  mountPath: {{ include "cacheclip.models.dir" . }}
  readOnly: true
  {{- if and (eq $model.source "existingClaim") $model.existingClaim.subPath }}
  subPath: {{ $model.existingClaim.subPath }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "cacheclip.models.volumes" -}}
{{- $model := get .root.Values.models .model -}}
{{- if eq $model.source "existingClaim" -}}
- name: model
  persistentVolumeClaim:
    claimName: {{ $model.existingClaim.name }}
    readOnly: true
{{- else if include "cacheclip.models.copied" . -}}
- name: model
  emptyDir:
    sizeLimit: {{ $model.sizeLimit }}
- name: fetch-model
  configMap:
    name: {{ include "cacheclip.component" (dict "root" .root "component" "models") }}
{{- end -}}
{{- end -}}

{{/* The container that copies and checks, of dict "root" "model" "files" (key of the list in the ConfigMap). */}}
{{- define "cacheclip.models.init" -}}
{{- if include "cacheclip.models.copied" . -}}
{{- $model := get .root.Values.models .model -}}
{{- $fetch := .root.Values.models.fetch -}}
{{- $from := ternary $model.url.base $model.image.path (eq $model.source "url") -}}
- name: fetch-model
  image: {{ ternary $fetch.image $model.image.reference (eq $model.source "url") }}
  imagePullPolicy: {{ ternary $fetch.pullPolicy $model.image.pullPolicy (eq $model.source "url") }}
  command: [/bin/sh, /etc/fetch-model/fetch-model.sh]
  args:
    - {{ $from | quote }}
    - /etc/fetch-model/{{ .files }}
    - {{ include "cacheclip.models.dir" . }}
  resources:
    {{- toYaml $fetch.resources | nindent 4 }}
  securityContext:
    {{- include "cacheclip.containerSecurity" . | nindent 4 }}
  volumeMounts:
    - name: model
      mountPath: {{ include "cacheclip.models.dir" . }}
    - name: fetch-model
      mountPath: /etc/fetch-model
      readOnly: true
{{- end -}}
{{- end -}}

{{/* Checksums of the files a pod copies: another digest is another pod. Of dict "root" "model". */}}
{{- define "cacheclip.models.checksum" -}}
{{- if include "cacheclip.models.copied" . -}}
checksum/model: {{ get .root.Values.models .model | toJson | sha256sum }}
{{- end -}}
{{- end -}}

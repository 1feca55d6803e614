{{/* Names leave room for the longest suffix below, so that no two become equal when a label's 63 characters are full. */}}
{{- define "wattlock.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "wattlock.operatorName" -}}
{{- printf "%s-operator" (include "wattlock.fullname" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "wattlock.agentName" -}}
{{- printf "%s-agent" (include "wattlock.fullname" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "wattlock.releaseHookName" -}}
{{- printf "%s-release-all" (include "wattlock.fullname" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "wattlock.agentNamespace" -}}
{{- default .Release.Namespace .Values.agent.namespace -}}
{{- end -}}

{{- define "wattlock.commonLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/part-of: "wattlock"
{{ include "wattlock.selectorLabels" . }}
{{- end -}}

{{/* Labels of pods: none that change with the chart's version, for a change of a label restarts the pod. */}}
{{- define "wattlock.podLabels" -}}
app.kubernetes.io/part-of: "wattlock"
{{ include "wattlock.selectorLabels" . }}
{{- end -}}

{{/* The operator selects its agents by this name, so it does not follow nameOverride. */}}
{{- define "wattlock.selectorLabels" -}}
app.kubernetes.io/name: "wattlock"
app.kubernetes.io/instance: {{ .Release.Name | trunc 63 | trimSuffix "-" | quote }}
{{- end -}}

{{/* Reference of an image; call with (list . .Values.operator.image). */}}
{{- define "wattlock.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- $name := printf "%s/%s" $root.Values.image.registry $image.repository -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $name $image.digest | quote -}}
{{- else -}}
{{- printf "%s:%s" $name (default $root.Chart.AppVersion $root.Values.image.tag) | quote -}}
{{- end -}}
{{- end -}}

{{/* What Pod Security's level "restricted" asks of a pod that needs nothing of its node. */}}
{{- define "wattlock.restrictedPodSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "wattlock.restrictedContainerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end -}}

{{- define "wattlock.scrapeAnnotations" -}}
prometheus.io/scrape: "true"
prometheus.io/port: {{ . | quote }}
prometheus.io/path: /metrics
{{- end -}}

{{/* Environment of everything that runs the operator's image. */}}
{{- define "wattlock.operatorEnvironment" -}}
- name: WATTLOCK_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: WATTLOCK_AGENT_NAMESPACE
  value: {{ include "wattlock.agentNamespace" . | quote }}
- name: WATTLOCK_DEPLOYMENT
  value: {{ include "wattlock.operatorName" . | quote }}
- name: WATTLOCK_AGENT_TEMPLATE
  value: /etc/wattlock/agent-daemonset.yaml
{{- with .Values.metrics.hostNetworkNamespaces }}
- name: WATTLOCK_HOST_NETWORK_NAMESPACES
  value: {{ join "," . | quote }}
{{- end }}
- name: WATTLOCK_HTTP_PORT
  value: "8080"
- name: POD_NAME
  valueFrom: {fieldRef: {fieldPath: metadata.name}}
# Kopf asks for the user's name, which uid 65532 does not have.
- name: LOGNAME
  value: wattlock
{{- end -}}

{{/* Labels and annotations of what the release hook needs before its Job. */}}
{{- define "wattlock.releaseHookMetadata" -}}
labels:
  {{- include "wattlock.commonLabels" . | nindent 2 }}
  app.kubernetes.io/component: "release-hook"
annotations:
  helm.sh/hook: pre-delete
  helm.sh/hook-weight: "-10"
  helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}

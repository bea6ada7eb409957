package checkpoint_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

func TestParseSettings(t *testing.T) {
	const p = "stasis.dev/policy"
	full := checkpoint.Settings{Policy: checkpoint.PolicyResume, OnFailure: checkpoint.OnFailureColdStart, TCP: checkpoint.TCPClose}
	with := func(f func(s *checkpoint.Settings)) checkpoint.Settings { s := full; f(&s); return s }
	off := checkpoint.Settings{Policy: checkpoint.PolicyOff}
	for name, test := range map[string]struct {
		annotations map[string]string
		want        checkpoint.Settings
		names       string // the annotation that the error names; none if empty
	}{
		"none":                 {nil, off, ""},
		"others":               {map[string]string{"example.com/policy": "resume"}, off, ""},
		"off":                  {map[string]string{p: "off", "stasis.dev/tcp": "nonsense"}, off, ""},
		"resume":               {map[string]string{p: "resume"}, full, ""},
		"reboot":               {map[string]string{p: "reboot"}, with(func(s *checkpoint.Settings) { s.Policy = checkpoint.PolicyReboot }), ""},
		"all":                  {map[string]string{p: "resume", "stasis.dev/key": "Db-0", "stasis.dev/on-failure": "fail", "stasis.dev/tcp": "keep"}, checkpoint.Settings{Policy: checkpoint.PolicyResume, Key: "Db-0", OnFailure: checkpoint.OnFailureFail, TCP: checkpoint.TCPKeep}, ""},
		"defaults said":        {map[string]string{p: "resume", "stasis.dev/on-failure": "cold-start", "stasis.dev/tcp": "close"}, full, ""},
		"this container only":  {map[string]string{checkpoint.ContainerAnnotation(p, "app"): "resume"}, full, ""},
		"another container":    {map[string]string{checkpoint.ContainerAnnotation(p, "sidecar"): "resume"}, off, ""},
		"container wins":       {map[string]string{p: "resume", checkpoint.ContainerAnnotation(p, "app"): "off"}, off, ""},
		"container's key wins": {map[string]string{p: "resume", "stasis.dev/key": "pod", "key.stasis.dev/container.app": "own"}, with(func(s *checkpoint.Settings) { s.Key = "own" }), ""},
		"container says empty": {map[string]string{p: "resume", checkpoint.ContainerAnnotation(p, "app"): ""}, off, ""},
		"unknown policy":       {map[string]string{p: "Resume"}, off, p},
		"unknown failure":      {map[string]string{p: "resume", "stasis.dev/on-failure": "panic"}, off, "stasis.dev/on-failure"},
		"unknown tcp":          {map[string]string{p: "resume", "stasis.dev/tcp": "yes"}, off, "stasis.dev/tcp"},
		"oversized policy":     {map[string]string{p: strings.Repeat("x", 257)}, off, p},
		"oversized key":        {map[string]string{p: "resume", "stasis.dev/key": strings.Repeat("x", 257)}, off, "stasis.dev/key"},
		"key is a path":        {map[string]string{p: "resume", "stasis.dev/key": "../x"}, off, "stasis.dev/key"},
		"bad in a container":   {map[string]string{p: "resume", checkpoint.ContainerAnnotation(p, "app"): "maybe"}, off, p},
		"internal is not ours": {map[string]string{checkpoint.InternalPolicy: "resume"}, off, ""},
		"spaces are not cut":   {map[string]string{p: " resume"}, off, p},
		"key without a policy": {map[string]string{"stasis.dev/key": "../x"}, off, ""},
		"template's source":    {map[string]string{p: "template"}, with(func(s *checkpoint.Settings) { s.Policy = checkpoint.PolicyTemplate }), ""},
		"template":             {map[string]string{"stasis.dev/template": "shop"}, with(func(s *checkpoint.Settings) { s.Policy, s.Template = checkpoint.PolicyTemplate, "shop" }), ""},
		"template and resume":  {map[string]string{p: "resume", "template.stasis.dev/container.app": "shop"}, with(func(s *checkpoint.Settings) { s.Template = "shop" }), ""},
		"template, but off":    {map[string]string{p: "off", "stasis.dev/template": "shop"}, off, ""},
		"template is a path":   {map[string]string{"stasis.dev/template": "../x"}, off, "stasis.dev/template"},
		"promotion": {map[string]string{"stasis.dev/template": "shop", "stasis.dev/promote-after": "1m30s"}, with(func(s *checkpoint.Settings) {
			s.Policy, s.Template, s.PromoteAfter = checkpoint.PolicyTemplate, "shop", 90*time.Second
		}), ""},
		"promotion, one": {map[string]string{"stasis.dev/template": "shop", "promote-after.stasis.dev/container.app": "1s"}, with(func(s *checkpoint.Settings) {
			s.Policy, s.Template, s.PromoteAfter = checkpoint.PolicyTemplate, "shop", time.Second
		}), ""},
		"promotion, no unit":    {map[string]string{"stasis.dev/template": "shop", "stasis.dev/promote-after": "30"}, off, "stasis.dev/promote-after"},
		"promotion at once":     {map[string]string{"stasis.dev/template": "shop", "stasis.dev/promote-after": "0s"}, off, "stasis.dev/promote-after"},
		"promotion, too soon":   {map[string]string{"stasis.dev/template": "shop", "stasis.dev/promote-after": "999ms"}, off, "stasis.dev/promote-after"},
		"promotion, before":     {map[string]string{"stasis.dev/template": "shop", "stasis.dev/promote-after": "-5s"}, off, "stasis.dev/promote-after"},
		"promotion, too late":   {map[string]string{"stasis.dev/template": "shop", "stasis.dev/promote-after": "24h1s"}, off, "stasis.dev/promote-after"},
		"promotion to what":     {map[string]string{p: "template", "stasis.dev/promote-after": "5s"}, off, "stasis.dev/promote-after"},
		"promotion, oversized":  {map[string]string{"stasis.dev/template": "shop", "stasis.dev/promote-after": strings.Repeat("0", 257)}, off, "stasis.dev/promote-after"},
		"promotion, off":        {map[string]string{"stasis.dev/promote-after": "5s"}, off, ""},
		"lazy":                  {map[string]string{p: "resume", "stasis.dev/memory": "lazy"}, with(func(s *checkpoint.Settings) { s.Memory = checkpoint.MemoryLazy }), ""},
		"container is eager":    {map[string]string{p: "resume", "stasis.dev/memory": "lazy", "memory.stasis.dev/container.app": "eager"}, with(func(s *checkpoint.Settings) { s.Memory = checkpoint.MemoryEager }), ""},
		"unknown memory":        {map[string]string{p: "resume", "stasis.dev/memory": "on"}, off, "stasis.dev/memory"},
		"merge":                 {map[string]string{"stasis.dev/template": "shop", "stasis.dev/merge": "true"}, with(func(s *checkpoint.Settings) { s.Policy, s.Template, s.Merge = checkpoint.PolicyTemplate, "shop", true }), ""},
		"merge, but not this":   {map[string]string{"stasis.dev/template": "shop", "stasis.dev/merge": "true", "merge.stasis.dev/container.app": "false"}, with(func(s *checkpoint.Settings) { s.Policy, s.Template = checkpoint.PolicyTemplate, "shop" }), ""},
		"no merge, no template": {map[string]string{p: "resume", "stasis.dev/merge": "false"}, full, ""},
		"merge what":            {map[string]string{p: "resume", "stasis.dev/merge": "true"}, off, "stasis.dev/merge"},
		"unknown merge":         {map[string]string{"stasis.dev/template": "shop", "stasis.dev/merge": "yes"}, off, "stasis.dev/merge"},
		"hook":                  {map[string]string{p: "resume", "stasis.dev/after-restore": "signal SIGUSR2"}, with(func(s *checkpoint.Settings) { s.AfterRestore = "signal SIGUSR2" }), ""},
		"container's hook": {map[string]string{p: "resume", "stasis.dev/after-restore": "signal 1", "after-restore.stasis.dev/container.app": `exec ["x"]`}, with(func(s *checkpoint.Settings) {
			s.AfterRestore = `exec ["x"]`
		}), ""},
		"no hook here":          {map[string]string{p: "resume", "stasis.dev/after-restore": "signal 1", "after-restore.stasis.dev/container.app": ""}, full, ""},
		"bad hook":              {map[string]string{p: "resume", "stasis.dev/after-restore": "signal SIGKILL"}, off, "stasis.dev/after-restore"},
		"oversized hook":        {map[string]string{p: "resume", "stasis.dev/after-restore": "exec " + strings.Repeat("x", 252)}, off, "stasis.dev/after-restore"},
		"no template here":      {map[string]string{"stasis.dev/template": "shop", "template.stasis.dev/container.app": ""}, off, ""},
		"oversized, not policy": {map[string]string{"stasis.dev/tcp": strings.Repeat("x", 257)}, off, ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := checkpoint.ParseSettings(test.annotations, "app")
			if got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
			if (err != nil) != (test.names != "") {
				t.Fatalf("error %v", err)
			}
			if err != nil && (!errors.Is(err, checkpoint.ErrInvalid) || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), test.names) || len(err.Error()) > 1000) {
				t.Errorf("error %v", err)
			}
			if got.OptedIn() != (test.want.Policy != checkpoint.PolicyOff) {
				t.Errorf("opted in: %v", got.OptedIn())
			}
		})
	}
}

func TestValidateKey(t *testing.T) {
	for key, ok := range map[string]bool{
		"a": true, "0": true, "A.b_c-d": true, strings.Repeat("x", 128): true,
		"": false, strings.Repeat("x", 129): false, ".": false, "..": false, "a..b": false, ".a": false, "-a": false, "_a": false,
		"a/b": false, "a b": false, "a\n": false, "a\x00": false, "ä": false, "a\xff": false, "a:b": false,
	} {
		err := checkpoint.ValidateKey(key)
		if (err == nil) != ok || err != nil && !errors.Is(err, checkpoint.ErrInvalid) {
			t.Errorf("%q: %v", key, err)
		}
	}
}

func TestValidateTemplateName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "0": true, "shop-2": true, strings.Repeat("x", 63): true,
		"": false, strings.Repeat("x", 64): false, ".": false, "..": false, "a.b": false, "-a": false, "a-": false, "A": false,
		"a/b": false, "a b": false, "a\n": false, "a\x00": false, "ä": false, "a_b": false, "a@b": false,
	} {
		err := checkpoint.ValidateTemplateName(name)
		if (err == nil) != ok || err != nil && !errors.Is(err, checkpoint.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestReserved(t *testing.T) {
	for name, want := range map[string]bool{
		checkpoint.InternalPolicy: true, checkpoint.InternalCheckpointID: true, checkpoint.InternalTemplateVersion: true, "stasis.dev/internal.new": true, "org.criu.config": true,
		checkpoint.AnnotationPolicy: false, "stasis.dev/internal": false, "org.criu.config2": false, "": false,
	} {
		if got := checkpoint.Reserved(name); got != want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// FuzzParseSettings: whatever a user writes, the settings are either off or
// made of known values, and off after an error.
func FuzzParseSettings(f *testing.F) {
	f.Add("resume", "key", "fail", "keep", "off", "app")
	f.Add("reboot", "", "", "", "", "")
	f.Add("x", "..", "x", "x", "x", "a/b")
	f.Fuzz(func(t *testing.T, policy, key, onFailure, tcp, own, container string) {
		s, err := checkpoint.ParseSettings(map[string]string{
			checkpoint.AnnotationPolicy: policy, checkpoint.AnnotationKey: key, checkpoint.AnnotationOnFailure: onFailure,
			checkpoint.AnnotationTCP: tcp, checkpoint.ContainerAnnotation(checkpoint.AnnotationPolicy, container): own,
		}, container)
		if err != nil && (s.OptedIn() || !errors.Is(err, checkpoint.ErrInvalid)) {
			t.Errorf("%+v after %v", s, err)
		}
		if !s.OptedIn() {
			if s != (checkpoint.Settings{Policy: checkpoint.PolicyOff}) {
				t.Errorf("off, but %+v", s)
			}
			return
		}
		if own != string(s.Policy) {
			t.Errorf("policy %s, the container's own is %q", s.Policy, own)
		}
		if s.Key != "" && checkpoint.ValidateKey(s.Key) != nil {
			t.Errorf("key %q", s.Key)
		}
		if s.OnFailure != checkpoint.OnFailureColdStart && s.OnFailure != checkpoint.OnFailureFail || s.TCP != checkpoint.TCPClose && s.TCP != checkpoint.TCPKeep {
			t.Errorf("%+v", s)
		}
	})
}

// TestContainerAnnotation: the form for one container is a name that Kubernetes
// accepts: one slash, a DNS subdomain before it, at most 63 bytes after it.
func TestContainerAnnotation(t *testing.T) {
	for _, name := range []string{checkpoint.AnnotationPolicy, checkpoint.AnnotationKey, checkpoint.AnnotationOnFailure, checkpoint.AnnotationTCP, checkpoint.AnnotationTemplate, checkpoint.AnnotationMemory, checkpoint.AnnotationPromoteAfter, checkpoint.AnnotationMerge, checkpoint.AnnotationAfterRestore} {
		got := checkpoint.ContainerAnnotation(name, strings.Repeat("c", 53))
		prefix, rest, _ := strings.Cut(got, "/")
		if strings.Contains(rest, "/") || len(rest) > 63 || !strings.HasSuffix(prefix, ".stasis.dev") {
			t.Errorf("%q is not a qualified name", got)
		}
		if !checkpoint.Known(got) || !checkpoint.Known(name) || !checkpoint.Ours(got) {
			t.Errorf("%q is not known", got)
		}
	}
	for _, name := range []string{"stasis.dev/polici", "stasis.dev/policy/container.c", "polici.stasis.dev/container.c", checkpoint.InternalKey} {
		if checkpoint.Known(name) || !checkpoint.Ours(name) {
			t.Errorf("%q: known %v, ours %v", name, checkpoint.Known(name), checkpoint.Ours(name))
		}
	}
	if checkpoint.Ours("example.com/policy") {
		t.Error("example.com/policy is not ours")
	}
}

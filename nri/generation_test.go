package nri

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/nri/pkg/api"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// TestMountGeneration: who has to do with templates gets a mount whose source is
// there, as long as the container is; who mounts something there itself does not.
func TestMountGeneration(t *testing.T) {
	template := map[string]string{checkpoint.InternalPolicy: "template"}
	for name, tc := range map[string]struct {
		set    map[string]string
		id     string
		mounts []string
		want   bool
	}{
		"not opted in":          {},
		"resume":                {set: map[string]string{checkpoint.InternalPolicy: "resume"}},
		"template's source":     {set: template, want: true},
		"resume and a template": {set: map[string]string{checkpoint.InternalPolicy: "resume", checkpoint.InternalTemplate: "shop"}, want: true},
		"other mounts":          {set: template, mounts: []string{"/run/secrets", "/running", "/run/stasis2"}, want: true},
		"own /run":              {set: template, mounts: []string{"/proc", "/run/"}},
		"own mount there":       {set: template, mounts: []string{"/run/stasis"}},
		"own mount below":       {set: template, mounts: []string{"/run/stasis/x"}},
		"hostile id":            {set: template, id: "../../etc"},
	} {
		t.Run(name, func(t *testing.T) {
			p, _ := testPlugin(nil)
			p.runtimeDir = t.TempDir()
			c := &api.Container{Id: "id"}
			if tc.id != "" {
				c.Id = tc.id
			}
			for _, dest := range tc.mounts {
				c.Mounts = append(c.Mounts, &api.Mount{Destination: dest})
			}
			m := p.mountGeneration(t.Context(), c, Decision{Set: tc.set})
			if (m != nil) != tc.want {
				t.Fatalf("mount %v", m)
			}
			if m == nil {
				return
			}
			if _, err := os.Stat(filepath.Join(m.Source, checkpoint.GenerationFile)); err != nil || m.Destination != checkpoint.GenerationMount {
				t.Errorf("%v: %v", m, err)
			}
			conn := &connection{plugin: p, synced: make(chan struct{})}
			if _, err := conn.Synchronize(t.Context(), nil, []*api.Container{c}); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(m.Source); err != nil {
				t.Errorf("while the container is there: %v", err)
			}
			if err := conn.RemoveContainer(t.Context(), nil, c); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(m.Source); !os.IsNotExist(err) {
				t.Errorf("after its removal: %v", err)
			}
		})
	}
}

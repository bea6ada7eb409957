package reboot

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/stasis-containers/stasis/pkg/checkpoint"
)

// criNamespace is containerd's name space of what the kubelet creates.
const criNamespace = "k8s.io"

// Missed is a container of an opted-in pod that was created while the daemon was
// not connected to the runtime. Nothing in its bundle says that it opted in, and
// its shim takes it for an ordinary one.
type Missed struct {
	Identity    checkpoint.Identity `json:"identity"`
	PodName     string              `json:"podName"`
	PodUID      string              `json:"podUID"`
	ContainerID string              `json:"containerID"`
}

var errMissed = errors.New("it was created while stasisd was not connected: create the pod again, or restart its container")

// container is m with what Look tells of it.
func (m *Missed) container(state string) Container {
	return Container{Namespace: criNamespace, ID: m.ContainerID, Bundle: filepath.Join(state, tasksDir, criNamespace, m.ContainerID),
		Identity: m.Identity, PodName: m.PodName, PodUID: m.PodUID, Err: errMissed}
}

// StillThere leaves out the containers that have no bundle any more below
// containerd's state directory, and sorts the others by identity.
func StillThere(state string, all []Missed) []Missed {
	there := slices.DeleteFunc(slices.Clone(all), func(m Missed) bool {
		if !containerID(m.ContainerID) {
			return true
		}
		c := m.container(state)
		_, err := os.Lstat(c.Bundle)
		return errors.Is(err, fs.ErrNotExist)
	})
	slices.SortFunc(there, func(a, b Missed) int {
		return cmp.Or(cmp.Compare(a.Identity.String(), b.Identity.String()), cmp.Compare(a.ContainerID, b.ContainerID))
	})
	return there
}

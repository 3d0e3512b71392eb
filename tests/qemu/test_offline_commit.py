#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
# ctest: timeout 600
"""Block commits in the images of a VM that is powered off: the disk and every incremental stay right, then and when the
VM runs again."""
import harness
from commits import OfflineLayers

LAYERS = 4  # the one that the VM is started with included


class OfflineCommit(OfflineLayers):
    def every_spread(self, top, base, *flags):
        """Layers are counted from below."""
        self.begin()
        self.build(LAYERS)
        self.power_off()
        self.serve()
        self.check(self.names, 'before')
        words = ['--active'] if top == LAYERS - 1 else ['--top', self.files[top]]
        done = self.commit(*words, '--base', self.files[base], *flags)
        print(done.stdout)
        self.assertNotIn('broken', self.states().values())
        self.wait_closed(self.daemon)
        self.check(self.names, f'{top} into {base}')

    def test_second_layer_into_the_one_below(self):
        self.every_spread(2, 1)

    def test_active(self):
        self.every_spread(3, 1)


if __name__ == '__main__':
    harness.main()
